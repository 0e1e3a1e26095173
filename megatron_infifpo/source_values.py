"""What becomes of the sources' values before they are fused: their level, their spread, clipping.

Pure PyTorch. A value is one log-prob a response, a sum or a mean. B records, R responses, M
sources; `valid` bool `[B, R]` says which responses are there, None: all of them. What stands where
one is absent or a source is masked must be finite, and does not matter.
"""

from typing import Annotated

import torch
from torch import Tensor

from megatron_infifpo.options import Option, declared

SOURCE_VALUES = ("raw", "centred", "standardised")
CLIP_BY = ("response", "pair")


def clip_sources(source_logps: Tensor, initial_logps: Tensor, preferred: Tensor) -> Tensor:
    """Probability clipping: a source may only help a preferred and only hurt a rejected response.

    Args:
        source_logps: `[B, R, M]`.
        initial_logps: `[B, R]` of the pivot before preference training.
        preferred: bool `[R]` or `[B, R]`, true for responses that the loss pushes up.

    Returns:
        `[B, R, M]`: `max(s, init)` where preferred, `min(s, init)` where rejected.
    """
    initial = initial_logps.unsqueeze(-1)
    raised, lowered = torch.maximum(source_logps, initial), torch.minimum(source_logps, initial)
    return torch.where(preferred.unsqueeze(-1), raised, lowered)


def clip_margins(
    source_logps: Tensor, initial_logps: Tensor, preferred: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Clipping by pair: a source counts as it is with a margin of at least the initial pivot's.

    A margin is the mean over the preferred responses minus the mean over the others; a list without
    one side has none, and every source counts as it is.

    Args:
        source_logps: `[B, R, M]`.
        initial_logps: `[B, R]`.
        preferred: bool `[R]` or `[B, R]`.
        valid: see above.

    Returns:
        `[B, R, M]`: the initial pivot's values in place of those of a source below its margin.
    """
    there = torch.ones_like(initial_logps, dtype=torch.bool) if valid is None else valid
    initial = initial_logps.unsqueeze(-1)
    sides = [(there & side).unsqueeze(-1) for side in (preferred, ~preferred)]

    def margin(values: Tensor) -> Tensor:
        better, others = (_mean(values, side) for side in sides)
        return better - others

    both = sides[0].any(dim=1, keepdim=True) & sides[1].any(dim=1, keepdim=True)
    return torch.where(both & (margin(source_logps) < margin(initial)), initial, source_logps)


def centred(
    source_logps: Tensor, initial_logps: Tensor, scales: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Each source's values as `c + k (s - mean s)`, means over a record's responses.

    `c` is the mean of the initial pivot, so what a source's tokenizer does to the level is gone.

    Args:
        source_logps: `[B, R, M]`.
        initial_logps: `[B, R]`.
        scales: `[M]` or `[B, M]`, k of each source; see `standard_scales`.
        valid: see above.

    Returns:
        `[B, R, M]`.
    """
    initial = initial_logps.unsqueeze(-1)
    there = torch.ones_like(initial, dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    wide = scales.to(source_logps.dtype).expand(len(source_logps), source_logps.shape[-1])
    return _mean(initial, there) + wide[:, None] * (source_logps - _mean(source_logps, there))


def standard_scales(
    source_logps: Tensor, initial_logps: Tensor, source_mask: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Scales that make the deviations of each source's values as large as the initial pivot's.

    Deviations are from a record's mean over its responses; of a pair they are half its margin.
    Large is the root of their mean square over the records in which a source takes part.

    Args:
        source_logps: `[B, R, M]`, of all training records.
        initial_logps: `[B, R]`.
        source_mask: bool `[B, M]`.
        valid: see above.

    Returns:
        `[M]`; 1 for a source that takes part nowhere or finds all responses of a prompt alike.
    """
    initial = initial_logps.unsqueeze(-1)
    there = torch.ones_like(initial, dtype=torch.bool) if valid is None else valid.unsqueeze(-1)
    counted = there & source_mask[:, None]

    def squares(values: Tensor) -> Tensor:
        away = (values - _mean(values, there)).expand_as(source_logps)
        return torch.where(counted, away**2, 0.0).sum(dim=(0, 1))

    own, pivots = squares(source_logps), squares(initial)
    return torch.where(own > 0, (pivots / own).sqrt(), torch.ones_like(own))


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Mean over the responses that are there, `[B, 1, M]` of `[B, R, M]`; 0 without any."""
    total = torch.where(there, values, 0.0).sum(dim=1, keepdim=True)
    return total / there.sum(dim=1, keepdim=True).clamp_min(1)


def prepare_sources(
    source_logps: Tensor,
    initial_logps: Tensor,
    preferred: Tensor,
    valid: Tensor | None = None,
    *,
    clip: bool,
    clip_by: Annotated[
        str,
        Option(
            "clip the value of each response; or take the initial pivot's values in place of those "
            "of each source with a smaller margin in the record",
            choices=CLIP_BY,
        ),
    ] = "response",
    source_values: Annotated[
        str,
        Option(
            "each source's values before they are clipped: as they are; around the initial pivot's "
            "mean in every record; or so, with its margins as wide as the initial pivot's",
            choices=SOURCE_VALUES,
        ),
    ] = "raw",
    source_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return sources' values as they are fused, `[B, R, M]`, and which of them clipping changed.

    Args:
        source_logps: `[B, R, M]`.
        initial_logps: `[B, R]`.
        preferred: bool `[R]` or `[B, R]`.
        valid: see above.
        clip: clip, and say what that changed; else None is in its place.
        clip_by: "response", by `clip_sources`, or "pair", by `clip_margins`.
        source_values: "raw"; "centred"; or "standardised", centred with these scales.
        source_scales: `[M]` or `[B, M]`, see `standard_scales`.

    Raises:
        ValueError: an unknown choice, or one that is missing or has no effect.
    """
    given = {"clip_by": clip_by, "source_values": source_values}
    for name, option in VALUE_OPTIONS.items():
        if expected := option.expected(given[name]):
            raise ValueError(f"{name} is {given[name]!r}, expected {expected}")
    if clip_by != "response" and not clip:
        raise ValueError(f"clip_by {clip_by!r} has no effect without clip")
    if (source_values == "standardised") != (source_scales is not None):
        raise ValueError('source_values "standardised" needs source_scales, and nothing else does')
    if source_values != "raw":
        one = source_logps.new_ones(source_logps.shape[-1:])
        scales = one if source_scales is None else source_scales
        source_logps = centred(source_logps, initial_logps, scales, valid)
    if not clip:
        return source_logps, None
    if clip_by == "pair":
        clipped = clip_margins(source_logps, initial_logps, preferred, valid)
    else:
        clipped = clip_sources(source_logps, initial_logps, preferred)
    return clipped, clipped != source_logps


VALUE_OPTIONS = declared(prepare_sources)
"""Options of what comes before any fusion."""
