"""Which models of a sources.yaml are fused."""

from collections.abc import Sequence

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.soft_targets import SEVERAL
from megatron_infifpo.references.sources import INITIAL, Source, SourcesConfig

_TAKEN = {INITIAL: "the initial pivot", "several": "what several sources say of one token"}


def choose_sources(
    config: SourcesConfig, only: Sequence[str] | None, *, include_initial: bool
) -> list[Source]:
    """Choose the sources that take part, the initial pivot as the last one.

    Args:
        config: the sources.yaml.
        only: names of the sources; None: all.
        include_initial: the initial pivot is a source, too. One of weight 0 is absent, as any.

    Raises:
        UserError: a name of no source, or one that means something else; too few or too many.
    """
    known = [source.name for source in config.sources]
    for name in known:
        if name in _TAKEN:
            raise UserError(
                f"{config.path} has a source of the name {name!r}, expected another name: "
                f"{_TAKEN[name]} is called so"
            )
    for name in only or ():
        if name not in known:
            raise UserError(
                f"--only names {name!r}, expected sources of {config.path}: {', '.join(known)}"
                + (" (--include-initial takes the initial pivot)" if name == INITIAL else "")
            )
    chosen = [source for source in config.sources if only is None or source.name in only]
    if include_initial:
        chosen.append(Source(INITIAL, config.initial, weight=config.initial_weight))
    chosen = [source for source in chosen if source.weight > 0]
    if not 0 < len(chosen) < SEVERAL:
        raise UserError(
            f"{config.path} has {len(chosen)} sources to fuse, expected 1 to {SEVERAL - 1} "
            "(of a weight above 0, where they are weighted)"
        )
    return chosen


def idle_weights(sources: Sequence[Source], path: str, fusion: str) -> str | None:
    """Say that weights have no effect, where they differ and the fusion does not read them."""
    if fusion == "mean" or len({source.weight for source in sources}) == 1:
        return None
    said = ", ".join(f"{source.name} {source.weight:g}" for source in sources)
    return f"the weights in {path} ({said}) have no effect: --fusion is {fusion}"
