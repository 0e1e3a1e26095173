"""What a method learns from: soft targets that are of its tokens, and that its loss can use."""

from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method
from megatron_infifpo.references.soft_targets import VALUES, SoftTargetStore
from megatron_infifpo.references.sources import INITIAL
from megatron_infifpo.tokens.dataset import TokenDataset

# Where ids that stand for several of the pivot's keep their mass among the ids.
KEPT_AMONG_IDS = ("id", "group")


def open_targets(method: Method, prefix: str | Path, tokens: TokenDataset) -> SoftTargetStore:
    """Open soft targets.

    Args:
        method: that learns from them.
        prefix: of the data set.
        tokens: that they must be of.

    Raises:
        UserError: they are of other tokens, of more sources than the method learns from, or hold
            what its loss cannot learn from.
    """
    store = SoftTargetStore(prefix)
    store.check_against(tokens)
    if "top_values" in method.reads:
        _check_values(method, store)
    else:
        _check_fused(method, store)
    return store


def _check_values(method: Method, store: SoftTargetStore) -> None:
    if store.fusion != VALUES:
        raise UserError(
            f"{store.prefix} was written with --fusion {store.fusion}, expected {VALUES} for the "
            "method: fuse again, to another --output"
        )
    # Standardised, two values are always the same two, and one is one in any case.
    least = 2 if method.loss_option("standardisation") == "none" else 3
    if store.top_k < least:
        raise UserError(
            f"{store.prefix} has the {store.top_k} highest values of each token, expected at least "
            f"{least}: the distance of fewer is always 0, and nothing is learnt; fuse again with a "
            "larger --top-k, to another --output"
        )


def _check_fused(method: Method, store: SoftTargetStore) -> None:
    if store.fusion == VALUES:
        raise UserError(
            f"{store.prefix} was written with --fusion {VALUES}, expected mince, average-ce or "
            "mean for the method: fuse again, to another --output"
        )
    ambiguous = store.manifest["ambiguous"]
    if method.loss_option("tail") == "renormalised" and ambiguous not in KEPT_AMONG_IDS:
        raise UserError(
            f"{store.prefix} was written with --ambiguous {ambiguous}, which moves mass of ids "
            "into the tail, and --tail renormalised leaves the tail out: what is left would be "
            "taken for all that a source says; fuse again with --ambiguous "
            f"{' or '.join(KEPT_AMONG_IDS)}, to another --output, or take --tail ghost"
        )
    assert method.token_loss is not None
    most = method.token_loss.most_sources
    others = store.sources[: len(store.sources) - store.manifest["include_initial"]]
    if most is not None and len(others) > most:
        raise UserError(
            f"{store.prefix} has targets of {', '.join(others)}: the method learns from one "
            f"source beside the {INITIAL} pivot, and models of several are merged then; fuse with "
            "--only NAME for each, or train with --method fusellm"
        )
