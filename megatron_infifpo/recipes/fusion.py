"""Stages of token-level fusion: soft targets of the SFT half, and models that are merged.

Their sources are those of RUN/sources.yaml, in a folder of its own: the log-probs that they name
are of the SFT half there.
"""

from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.job import PIVOT, RUN, Job, split_words
from megatron_infifpo.references.sources import Source, SourcesConfig, read_sources

TOP_K = 16


def token_sources(run: str) -> SourcesConfig:
    """Read the sources of token-level fusion, whose log-probs are of the SFT half.

    Raises:
        UserError: there is no such file, or it is none.
    """
    path = f"{run}/fusion/sources.yaml"
    if not Path(path).is_file():
        raise UserError(
            f"{path} is missing, expected the sources of {run}/sources.yaml, with log-probs of "
            f"the SFT half beside it: mkdir -p {run}/fusion && ln -s ../sources.yaml {path}"
        )
    return read_sources(path)


def source_at(config: SourcesConfig, index: int, zero: str) -> Source:
    """The source of that number, counted from 1."""
    if not 0 < index <= len(config.sources):
        raise UserError(
            f"{config.path} has {len(config.sources)} sources, but index is {index}: expected "
            f"{zero} to their number"
        )
    return config.sources[index - 1]


def of_source(run: str, method: str, index: int) -> str:
    """What a method is called where it learns from the i-th source alone."""
    if index == 0:
        return method
    return f"{method}-{source_at(token_sources(run), index, '0 (all of them)').name}"


def fuse(
    run: str = RUN,
    method: str = "fusellm",
    index: int = 0,
    ambiguous: str | None = None,
    flags: str = "",
) -> Job:
    """Fuse what the sources say of the SFT half's tokens, to RUN/fusion/METHOD.

    Args:
        run: folder of the run.
        method: fusellm, fusechat or infifusion.
        index: 0 for all sources, i for the i-th one alone, to RUN/fusion/METHOD-NAME.
        ambiguous: what becomes of ids that stand for several of the pivot's: digits, tail, group or
            id; infifusion has no use for it.
        flags: further ones of `infifpo fuse-targets`.

    Raises:
        UserError: there is no such source, or the method reads no soft targets.
    """
    from megatron_infifpo.methods import METHODS  # here: it imports torch

    config = token_sources(run)
    if method not in METHODS or not METHODS[method].soft_targets:
        known = ", ".join(name for name, each in METHODS.items() if each.soft_targets)
        raise UserError(f"method={method} reads no soft targets, expected one of {known}")
    name = of_source(run, method, index)
    arguments = ["fuse-targets", "--data", f"{run}/data/sft", "--sources", config.path]
    arguments += ["--output", f"{run}/fusion/{name}"]
    if "top_values" in METHODS[method].reads:
        arguments += ["--fusion", "none"]
    else:
        arguments += ["--fusion", "mince", "--include-initial"]
        arguments += ["--ambiguous", ambiguous] if ambiguous else []
    if index:
        arguments += ["--only", config.sources[index - 1].name]
    return Job(f"fuse-{name}", (*arguments, *split_words(flags, "flags")))


def merge(run: str = RUN, hf: str = PIVOT, method: str = "fusechat", flags: str = "") -> Job:
    """Merge what was trained on each source alone, RUN/METHOD-NAME-hf, to RUN/METHOD-hf.

    Args:
        run: folder of the run.
        hf: the pivot's Hugging Face folder.
        method: of the models.
        flags: further ones of `infifpo merge`, `--method` too: SCE without it.
    """
    names = [source.name for source in token_sources(run).sources]
    arguments = ["merge", "--method", "sce", "--base", hf]
    arguments += ["--models", *(f"{run}/{method}-{name}-hf" for name in names)]
    arguments += ["--output", f"{run}/{method}-hf"]
    return Job(f"merge-{method}", (*arguments, *split_words(flags, "flags")))
