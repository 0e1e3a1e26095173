"""Weights of pairs: how far the sources agree that the chosen response is the better one.

Clipping keeps a source from contradicting a label. Where labels are wrong, that contradiction is
what sources know: as a weight in [0, 1] of the pair's loss it discounts the pair, and never inverts
it. Pure PyTorch. B pairs, R responses, M sources.

A verdict of a source is `sigmoid(scale (s_chosen - s_rejected))`, s its log-probs of the responses.
With sums and a scale of 1 it is the probability that the source, of which we know that it gave one
of the two, gave the chosen one. It is a constant of the pair, and so is the weight.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.options import Option, values_read

SCALE = Option("multiplies a source's margin in its verdict on a pair", range="(0, inf)")
CUT = Option("pairs with a smaller weight than this count nothing, all others 1", range="(0, 1)")

# Every kind: `(mask [B, M], ...)` to shares `[B, M]` of the sources' verdicts, which `pair_weights`
# normalises. The mask says which source takes part.


def agreement(mask: Tensor) -> Tensor:
    """The same share for all sources."""
    return mask.double()


def best_source(mask: Tensor, accuracy: Tensor) -> Tensor:
    """The source with the highest known accuracy alone; the first one wins ties."""
    known = mask & ~accuracy.isnan()
    ranked = torch.where(known, accuracy, -1.0)
    # argmax gives no guarantee on ties: take the first index that reaches the maximum.
    best = (ranked == ranked.amax(dim=-1, keepdim=True)).to(torch.int8).argmax(dim=-1)
    return torch.nn.functional.one_hot(best, mask.shape[-1]) * known.double()


PAIR_WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "agreement": agreement,
    "best-source": best_source,
}


def reads(kind: str) -> Mapping[str, bool]:
    """What a kind takes beside the mask."""
    return values_read(PAIR_WEIGHTS[kind], 1)


def pair_weights(
    kind: str,
    source_logps: Tensor,
    *,
    scale: float,
    source_mask: Tensor | None = None,
    accuracy: Tensor | None = None,
    cut: float | None = None,
) -> Tensor:
    """Weight of every pair.

    Args:
        kind: "agreement", the mean of the verdicts of all sources that take part; "best-source",
            the verdict of the one with the highest accuracy.
        source_logps: `[B, R, M]`, sums or means, chosen and rejected first.
        scale: of the verdicts; 25 times larger for means than for sums, as beta.
        source_mask: bool `[B, M]`, false where a source takes no part; None: all do.
        accuracy: `[M]` or `[B, M]`, verified accuracies in [0, 1] in the records' domains, NaN
            where unknown; of "best-source" alone.
        cut: pairs of a smaller weight have 0 and all others 1; None: weights as they are.

    Returns:
        `[B]` in [0, 1]; 1 where no source has a verdict.

    Raises:
        ValueError: an unknown kind, a value out of its range, accuracies that are missing or have
            no effect, or shapes that do not fit.
    """
    if expected := Option("", choices=PAIR_WEIGHTS).expected(kind):
        raise ValueError(f"kind is {kind!r}, expected {expected}")
    for name, option, value in (("scale", SCALE, scale), ("cut", CUT, cut)):
        if value is not None and (expected := option.expected(value)):
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    if ("accuracy" in reads(kind)) != (accuracy is not None):
        needs = "has no effect for" if accuracy is not None else "is needed for"
        raise ValueError(f"accuracy {needs} the pair weights {kind!r}")
    if source_logps.dim() != 3 or source_logps.shape[1] < 2:
        raise ValueError(
            f"source_logps is {list(source_logps.shape)}, expected [B, R, M] with R of at least 2"
        )
    margins = source_logps[:, CHOSEN] - source_logps[:, REJECTED]
    mask = torch.ones_like(margins, dtype=torch.bool) if source_mask is None else source_mask
    read = {} if accuracy is None else {"accuracy": accuracy.expand(margins.shape)}
    shares = PAIR_WEIGHTS[kind](mask, **read).to(margins.dtype)
    # A masked source's value is arbitrary (it may be NaN): replace it before any arithmetic.
    verdicts = torch.sigmoid(scale * torch.where(mask, margins, 0.0))
    total = shares.sum(dim=-1)
    weights = torch.where(total > 0, (shares * verdicts).sum(dim=-1) / total.clamp_min(1), 1.0)
    return weights if cut is None else (weights >= cut).to(weights.dtype)
