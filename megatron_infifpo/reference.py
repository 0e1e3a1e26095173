"""Fused reference log-probs: clip each source against the initial pivot, then select or average.

Pure PyTorch and constant with respect to the policy: no gradient flows through a reference.
Equations: InfiFPO (arXiv 2505.13878), section 3. A log-prob here is one number a response: the mean
over its tokens under length normalisation, else the sum.

A fusion declares its options at its keyword arguments; flags, their help and their checks follow.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from megatron_infifpo.options import Option, declared, values_read
from megatron_infifpo.source_values import prepare_sources

MARGIN_SPACES = ("prob", "log-prob")
MARGIN_ANCHORS = ("current", "initial")
SELECTIONS = ("response", "pair")
DEFAULT_FUSION = "max-margin"


@dataclass(frozen=True)
class FusedReference:
    """The reference of every response, and what it was made of.

    Attributes:
        logps: `[B, R]` fused reference log-prob of each response.
        weights: `[B, R, M]` share of each source; one-hot for max-margin, all zero where every
            source is masked and the initial pivot is the reference.
        clipped: bool `[B, R, M]`, true where clipping changed a source's value; None without it.
    """

    logps: Tensor
    weights: Tensor
    clipped: Tensor | None = None


def log_probability_margin(a: Tensor, b: Tensor) -> Tensor:
    """Return `log |exp(a) - exp(b)|`, -inf where `a == b`.

    Sums of log-probs underflow in `exp`, and then every margin would be 0: stay in log space.
    """
    gap = (a - b).abs()
    # log(1 - exp(-gap)): each form is exact where the other one cancels.
    log1mexp = torch.where(
        gap < math.log(2.0), torch.log(-torch.expm1(-gap)), torch.log1p(-torch.exp(-gap))
    )
    return torch.maximum(a, b) + log1mexp


# Every fusion: `(clipped [B, R, M], mask [B, R, M], current [B, R], initial [B, R], **options)` to
# weights `[B, R, M]`, which `fuse_reference` masks and normalises. Current and initial are the
# pivot's log-probs as it is and as it was. Beside its options it may take values of the row, at
# parameters of their names. A response that is absent has log-probs of 0 and no source.


def max_margin(
    clipped: Tensor,
    mask: Tensor,
    current: Tensor,
    initial: Tensor,
    *,
    margin_space: Annotated[
        str, Option("compare margins as probabilities or log-probs", choices=MARGIN_SPACES)
    ] = "prob",
    margin_anchor: Annotated[
        str,
        Option("measure margins to the current or to the initial pivot", choices=MARGIN_ANCHORS),
    ] = "current",
    selection: Annotated[
        str, Option("choose a source for each response, or for all of a record", choices=SELECTIONS)
    ] = "response",
) -> Tensor:
    """One-hot weights of the source that differs most from the anchor; first index wins ties."""
    anchor = current if margin_anchor == "current" else initial
    margins = _margins(clipped, anchor, margin_space, selection)
    # A zero margin is -inf in log space: keep it above a masked source.
    floor = torch.finfo(margins.dtype).min
    ranked = margins.clamp_min(floor).masked_fill(~mask, -math.inf)
    # argmax gives no guarantee on ties: take the first index that reaches the maximum.
    best = (ranked == ranked.amax(dim=-1, keepdim=True)).to(torch.int8).argmax(dim=-1)
    return torch.nn.functional.one_hot(best, clipped.shape[-1]).to(clipped.dtype)


def _margins(clipped: Tensor, anchor: Tensor, space: str, selection: str) -> Tensor:
    """Margin of every source to the anchor, `[B, R, M]`; one value a record under "pair"."""
    anchor = anchor.detach().unsqueeze(-1).expand_as(clipped)
    if space == "prob":
        margins = log_probability_margin(clipped, anchor)
        if selection == "pair":
            margins = margins.logsumexp(dim=1, keepdim=True).expand_as(clipped)
    else:
        margins = (clipped - anchor).abs()
        if selection == "pair":
            margins = margins.sum(dim=1, keepdim=True).expand_as(clipped)
    return margins


def _idle_in_max_margin(
    clip: str | None, initial_as_source: bool, mirrored: bool, **chosen: str
) -> dict[str, str]:
    """Options that change nothing beside the others, and why."""
    idle: dict[str, str] = {}
    if chosen["margin_anchor"] != "initial":
        return idle
    if initial_as_source:
        idle["initial_as_source"] = (
            "with --margin-anchor initial: the initial pivot's own margin is 0, it never wins"
        )
    if mirrored and (clip is not None or chosen["margin_space"] == "log-prob"):
        idle["selection"] = (
            "with --margin-anchor initial and these --source-values: both responses of a pair are "
            "of the source whose margin differs most from the initial pivot's"
        )
    by_response = clip == "response" and (chosen["selection"] == "response" or mirrored)
    if by_response and chosen["margin_space"] == "log-prob":
        idle["margin_space"] = (
            "with --margin-anchor initial and clipped sources: they lie on one side of the anchor, "
            "where log-probs rank as probabilities do"
        )
    return idle


def average(clipped: Tensor, mask: Tensor, current: Tensor, initial: Tensor) -> Tensor:
    """Equal weights."""
    return mask.to(clipped.dtype)


def confidence(clipped: Tensor, mask: Tensor, current: Tensor, initial: Tensor) -> Tensor:
    """Weights proportional to 1 / -log-prob, that is to 1 / log-perplexity for means."""
    # Centred values may be above 0, as no log-prob is: they count as certain.
    cost = (-clipped).clamp_min(0).masked_fill(~mask, math.inf)
    lowest = cost.amin(dim=-1, keepdim=True)
    # Scaled by the lowest cost, so that a log-prob of exactly 0 takes the limit and not 0 / 0.
    return torch.where(cost == lowest, torch.ones_like(cost), lowest / cost)


def weighted(
    clipped: Tensor, mask: Tensor, current: Tensor, initial: Tensor, source_weights: Tensor
) -> Tensor:
    """Given weights, at least 0, of the sources, `[M]` or `[B, M]` (FuseRLHF's gamma)."""
    records, _, sources = clipped.shape
    if source_weights.shape not in ((sources,), (records, sources)):
        raise ValueError(
            f"source_weights is {list(source_weights.shape)}, expected [{sources}] or "
            f"[{records}, {sources}]: a weight for each source"
        )
    weights = source_weights.to(clipped.dtype).expand(records, sources)
    return weights[:, None, :].expand_as(clipped)


@dataclass(frozen=True)
class Fusion:
    """A fusion, beside the options that its signature declares.

    Attributes:
        function: see above.
        idle: `(clip, initial_as_source, mirrored, **its options)` to options that then have no
            effect, and why; `clip` says by what sources are clipped, None: they are not; `mirrored`
            that both values of a pair are equally far from the initial pivot's mean.
        fixed: its weights do not depend on the values that it fuses.
    """

    function: Callable[..., Tensor]
    idle: Callable[..., dict[str, str]] = lambda clip, initial_as_source, mirrored, **options: {}
    fixed: bool = False

    @property
    def options(self) -> Mapping[str, Option]:
        """Its options."""
        return declared(self.function)

    @property
    def reads(self) -> Mapping[str, bool]:
        """Values of the row that it takes, and whether it needs them."""
        return values_read(self.function, 4)


FUSIONS: dict[str, Fusion] = {
    "max-margin": Fusion(max_margin, _idle_in_max_margin),
    "average": Fusion(average, fixed=True),
    "confidence": Fusion(confidence),
    "weighted": Fusion(weighted, fixed=True),
}


def _check_arguments(fusion: str, given: Mapping[str, Any]) -> None:
    """Refuse what a fusion does not take or lacks, options that none has, values of them."""
    if expected := Option("", choices=FUSIONS).expected(fusion):
        raise ValueError(f"fusion is {fusion!r}, expected {expected}")
    known = {name: option for one in FUSIONS.values() for name, option in one.options.items()}
    read = {name for one in FUSIONS.values() for name in one.reads}
    chosen = FUSIONS[fusion]
    for name, value in given.items():
        if name in read and name not in chosen.reads:
            raise ValueError(f"{name} has no effect for the fusion {fusion!r}")
        if name not in known and name not in read:
            raise ValueError(f"{name!r} is no option of a fusion, expected {', '.join(known)}")
        if name in known and (expected := known[name].expected(value)):
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    for name, needs in chosen.reads.items():
        if needs and name not in given:
            raise ValueError(f"the fusion {fusion!r} needs {name}")


def _check_shapes(sources: Tensor, initial: Tensor, policy: Tensor) -> None:
    records, responses, _ = sources.shape
    if initial.shape != (records, responses) or policy.shape != (records, responses):
        raise ValueError(
            f"source_logps is {list(sources.shape)}: expected initial_logps and policy_logps "
            f"of shape [{records}, {responses}], got {list(initial.shape)} and "
            f"{list(policy.shape)}"
        )


def _mix(weights: Tensor, values: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[B, R]` by weights that add up to 1, and these; the initial pivot where all are 0."""
    total = weights.sum(dim=-1, keepdim=True)
    weights = torch.where(total > 0, weights / total, weights)
    # A source of weight 0 is absent, whatever its value is.
    mixed = torch.where(weights == 0, 0.0, weights * values).sum(dim=-1)
    return torch.where(total.squeeze(-1) == 0, initial, mixed), weights


def _there(logps: Tensor, valid: Tensor | None) -> Tensor:
    """Log-probs `[B, R]`, 0 where a response is absent."""
    return logps if valid is None else torch.where(valid, logps, 0.0)


def _mask(sources: Tensor, mask: Tensor | None, valid: Tensor | None) -> Tensor:
    """Which of the values `[B, R, M]` take part."""
    there = torch.ones_like(sources, dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    return there.expand_as(sources) if mask is None else there & mask[:, None, :]


@torch.no_grad()
def fuse_reference(
    source_logps: Tensor,
    initial_logps: Tensor,
    policy_logps: Tensor,
    preferred: Tensor,
    *,
    fusion: str = DEFAULT_FUSION,
    clip: bool = True,
    source_mask: Tensor | None = None,
    source_weights: Tensor | None = None,
    valid: Tensor | None = None,
    clip_by: str = "response",
    source_values: str = "raw",
    source_scales: Tensor | None = None,
    **options: Any,
) -> FusedReference:
    """Fuse the sources' log-probs of every response into one reference.

    Args:
        source_logps: `[B, R, M]` log-prob of each response under each source.
        initial_logps: `[B, R]` under the pivot before preference training.
        policy_logps: `[B, R]` under the pivot as it is now; detached here.
        preferred: bool `[R]` or `[B, R]`, true for responses that the loss pushes up.
        fusion: "max-margin" (the source that differs most), "average", "confidence" or "weighted".
        clip: clip sources against the initial pivot before they are fused.
        source_mask: bool `[B, M]`, false where a source takes no part (its domain, its context).
        source_weights: `[M]` or `[B, M]`, at least 0, which "weighted" alone takes, and needs.
        valid: bool `[B, R]`, the responses that are there; None: all of them. The others may have
            any log-probs; their reference and their weights are 0.
        clip_by, source_values, source_scales: see `source_values.prepare_sources`.
        options: of a fusion, those of others have no effect. Of max-margin: `margin_space`, "prob"
            (the default) or "log-prob"; `margin_anchor`, margins to the "current" (the default) or
            "initial" pivot; `selection`, a source for each "response" (the default) or "pair".

    Returns:
        A `FusedReference`; the initial pivot where no source takes part with a weight above 0.

    Raises:
        ValueError: an unknown fusion, option or choice of one, weights that are missing or have no
            effect, or shapes that do not fit.
    """
    given = options if source_weights is None else options | {"source_weights": source_weights}
    _check_arguments(fusion, given)
    _check_shapes(source_logps, initial_logps, policy_logps)
    initial, policy = (_there(logps, valid) for logps in (initial_logps, policy_logps))
    mask = _mask(source_logps, source_mask, valid)
    # A masked source's value is arbitrary (it may be NaN): replace it before any arithmetic.
    values = torch.where(mask, source_logps, initial.unsqueeze(-1))
    before: dict[str, Any] = {"clip": clip, "clip_by": clip_by, "source_values": source_values}
    before["source_scales"] = source_scales
    values, changed = prepare_sources(values, initial, preferred, valid, **before)
    chosen = FUSIONS[fusion]
    own = {n: value for n, value in given.items() if n in chosen.options or n in chosen.reads}
    weights = chosen.function(values, mask, policy, initial, **own).masked_fill(~mask, 0.0)
    return FusedReference(*_mix(weights, values, initial), changed)
