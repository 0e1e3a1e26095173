"""What sources' values become before fusion: level, spread and clipping by pair."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.losses import LOSSES, preference_loss
from megatron_infifpo.reference import FUSIONS, fuse_reference
from megatron_infifpo.source_values import centred, clip_margins, clip_sources, standard_scales

PREFERRED = torch.tensor([True, False])


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -9 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def gap(logps: torch.Tensor) -> torch.Tensor:
    return logps[:, 0] - logps[:, 1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.sampled_from(["average", "max-margin"]))
def test_clipping_by_pair_has_the_margin_of_clipping_centred_values(seed, fusion):
    """Of every source; so of the mean of all, and of the reference where there is one source."""
    sources, initial = values(6, 2, 3, seed=seed), values(6, 2, seed=seed + 1)
    by_pair = clip_margins(sources, initial, PREFERRED)
    level = centred(sources, initial, torch.ones(3), None)
    by_response = clip_sources(level, initial, PREFERRED)
    torch.testing.assert_close(gap(by_pair), gap(by_response), atol=1e-12, rtol=0)
    expected = torch.maximum(gap(sources), gap(initial)[:, None])
    torch.testing.assert_close(gap(by_pair), expected, atol=1e-12, rtol=0)
    each: Any = ({"clip_by": "pair"}, {"source_values": "centred"})
    some = sources if fusion == "average" else sources[..., :1]
    fused = [
        fuse_reference(some, initial, initial, PREFERRED, fusion=fusion, **options).logps
        for options in each
    ]
    torch.testing.assert_close(gap(fused[0]), gap(fused[1]), atol=1e-12, rtol=0)


def test_clipping_by_pair_takes_a_source_as_it_is_or_not_at_all():
    initial = torch.tensor([[-2.0, -3.0]])  # a margin of 1
    # Margins of 0.5; 1; 2, though it finds both responses less likely than the initial pivot.
    sources = torch.tensor([[[-1.0, -2.0, -4.0], [-1.5, -3.0, -6.0]]])
    clipped = clip_margins(sources, initial, PREFERRED)
    assert clipped.tolist() == [[[-2.0, -2.0, -4.0], [-3.0, -3.0, -6.0]]]
    fused = fuse_reference(sources, initial, initial, PREFERRED, fusion="average", clip_by="pair")
    assert fused.clipped is not None
    assert fused.clipped.tolist() == [[[True, False, False]] * 2]


def test_clipping_a_list_by_the_means_of_its_sides():
    """Three of four responses are there; the better ones are two."""
    preferred = torch.tensor([[True, True, False, True]])
    valid = torch.tensor([[True, True, True, False]])
    initial = torch.tensor([[-1.0, -3.0, -4.0, math.nan]])  # a margin of 2
    sources = torch.tensor([[-2.0, -2.0, -4.5, math.nan], [0.0, -5.0, -4.0, math.nan]]).T[None]
    sources, initial = sources.nan_to_num(7.0), initial.nan_to_num(7.0)
    found = clip_margins(sources, initial, preferred, valid)[:, :3]
    assert torch.equal(found[..., 0], sources[:, :3, 0]), "2.5"
    assert torch.equal(found[..., 1], initial[:, :3]), "1.5"
    alike = clip_margins(sources, initial, torch.zeros_like(preferred), valid)
    assert torch.equal(alike, sources), "without a better response there is no margin"


def test_wrpo_has_two_preferred_responses():
    preferred = torch.tensor([True, False, True])
    initial, sources = values(5, 3), values(5, 3, 2, seed=1)
    found = clip_margins(sources, initial, preferred)
    margin = (sources[:, 0] + sources[:, 2]) / 2 - sources[:, 1]
    own = (initial[:, 0] + initial[:, 2]) / 2 - initial[:, 1]
    for b in range(5):
        for m in range(2):
            expected = initial[b] if margin[b, m] < own[b] else sources[b, :, m]
            assert torch.equal(found[b, :, m], expected)


def test_centred_values_have_the_initial_pivots_mean():
    sources, initial = values(4, 5, 3), values(4, 5, seed=1)
    valid = torch.arange(5) < torch.tensor([[2], [3], [4], [5]])
    found = centred(sources, initial, torch.tensor([1.0, 2.0, 0.5]), valid)
    for b, n in enumerate((2, 3, 4, 5)):
        mean = initial[b, :n].mean()
        torch.testing.assert_close(found[b, :n].mean(dim=0), mean.expand(3))
        deviations = sources[b, :n] - sources[b, :n].mean(dim=0)
        expected = mean + torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) * deviations
        torch.testing.assert_close(found[b, :n], expected)


def test_standardised_margins_are_as_wide_as_the_initial_pivots():
    sources = values(40, 2, 3) * torch.tensor([1.0, 5.0, 0.2]) - torch.tensor([0.0, 30.0, 4.0])
    initial, mask = values(40, 2, seed=1), torch.ones(40, 3, dtype=torch.bool)
    mask[:15, 1] = False
    scales = standard_scales(sources, initial, mask)
    found = centred(sources, initial, scales)
    for m in range(3):
        own, pivots = gap(found)[mask[:, m], m], gap(initial)[mask[:, m]]
        torch.testing.assert_close(own.square().mean(), pivots.square().mean())
        torch.testing.assert_close(own / scales[m], gap(sources)[mask[:, m], m])


def test_scales_of_lists_and_of_what_has_none():
    sources, initial = values(6, 4, 3), values(6, 4, seed=1)
    valid = torch.arange(4) < torch.tensor([[2], [4], [3], [4], [2], [4]])
    mask = torch.ones(6, 3, dtype=torch.bool)
    mask[:, 1] = False
    sources[..., 2] = -1.5  # a source that finds all responses alike
    scales = standard_scales(sources, initial, mask, valid)
    assert scales[1:].tolist() == [1.0, 1.0]
    own, pivots = 0.0, 0.0
    for b in range(6):
        for total, row in (("own", sources[b, valid[b], 0]), ("pivots", initial[b, valid[b]])):
            squares = (row - row.mean()).square().sum().item()
            own, pivots = (own + squares, pivots) if total == "own" else (own, pivots + squares)
    assert scales[0].item() == pytest.approx(math.sqrt(pivots / own))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("kind", ["centred", "standardised"])
def test_fusion_of_values_of_any_level(fusion, kind):
    """Absent and masked ones may hold anything; the initial pivot is unchanged by its own level."""
    options: Any = {"fusion": fusion, "source_values": kind}
    if fusion == "weighted":
        options["source_weights"] = torch.tensor([1.0, 2.0])
    if kind == "standardised":
        options["source_scales"] = torch.tensor([1.0, 3.0])
    sources, initial = values(3, 3, 2), values(3, 3, seed=1)
    valid = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    preferred = torch.tensor([True, False, False])
    run = {"source_mask": mask, "valid": valid, **options}
    clean = fuse_reference(sources, initial, initial, preferred, **run)
    there = mask[:, None] & valid[..., None]
    dirty = fuse_reference(
        torch.where(there, sources, math.nan),
        torch.where(valid, initial, math.nan),
        torch.where(valid, initial, math.nan),
        preferred,
        **run,
    )
    assert torch.equal(clean.logps, dirty.logps) and torch.isfinite(clean.logps).all()
    assert (clean.weights >= 0).all() and torch.equal(clean.logps[2], initial[2])
    # A source moved by 100 nats in all responses says the same.
    moved = fuse_reference(sources + 100, initial, initial, preferred, **run)
    torch.testing.assert_close(moved.logps, clean.logps)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clip_by": "record"}, "clip_by is 'record', expected one of response, pair"),
        ({"clip_by": "pair", "clip": False}, "clip_by 'pair' has no effect without clip"),
        ({"source_values": "z"}, "source_values is 'z', expected one of raw, centred, standard"),
        ({"source_values": "standardised"}, "needs source_scales, and nothing else does"),
        ({"source_scales": torch.ones(1)}, "needs source_scales, and nothing else does"),
    ],
)
def test_bad_arguments(options, message):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=message):
        fuse_reference(zeros[..., None], zeros, zeros, PREFERRED, **options)


@pytest.mark.parametrize("clip", [{"clip": False}, {"clip_by": "pair"}, {}], ids=str)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("objective", LOSSES)
def test_what_centring_changes(objective: str, fusion: str, clip: dict[str, Any]):
    """No loss of differences, of a fusion with fixed weights, unless responses are clipped each."""
    initial, policy, sources = values(6, 3), values(6, 3, seed=1), values(6, 3, 2, seed=2)
    read: dict[str, Any] = {name: torch.tensor([0.3, 0.7]) for name in FUSIONS[fusion].reads}
    loss, preferred = LOSSES[objective], torch.tensor([True, False, True])
    options: dict[str, Any] = {n: 0.3 for n, option in loss.options.items() if option.required}
    if "rewards" in loss.reads:
        options["rewards"] = values(6, 3, seed=3)

    def found(kind: str) -> torch.Tensor:
        reference = fuse_reference(
            sources, initial, policy, preferred, fusion=fusion, source_values=kind, **read, **clip
        )
        return preference_loss(objective, policy, reference.logps, beta=0.4, **options)

    same = torch.allclose(found("raw"), found("centred"), atol=1e-9, rtol=0)
    assert same == (loss.differences and FUSIONS[fusion].fixed and bool(clip))


@pytest.mark.parametrize("kind", ["centred", "standardised"])
def test_choices_between_which_centred_pairs_leave_nothing_to_choose(kind):
    """Both deviations of a pair from the initial pivot's are of one size."""
    initial, policy, sources = values(9, 3), values(9, 3, seed=1), values(9, 3, 4, seed=2)
    scales = {"source_scales": torch.tensor([0.5, 1.0, 2.0, 3.0])} if kind != "centred" else {}

    def found(responses: int, **options: Any) -> torch.Tensor:
        shown, first, now = (each[:, :responses] for each in (sources, initial, policy))
        preferred = torch.tensor([True, False, True])[:responses]
        options |= {"source_values": kind, **scales}
        return fuse_reference(shown, first, now, preferred, **options).logps

    def all_same(responses: int, choices: list[dict[str, Any]], **options: Any) -> bool:
        first, *others = (found(responses, **choice, **options) for choice in choices)
        return all(torch.allclose(first, other, atol=1e-9, rtol=0) for other in others)

    clips: list[dict[str, Any]] = [{"clip_by": "response"}, {"clip_by": "pair"}]
    for fusion in ("max-margin", "average", "confidence"):
        assert all_same(2, clips, fusion=fusion) and not all_same(3, clips, fusion=fusion)
    selections = [{"selection": each} for each in ("response", "pair")]
    both = [{**s, "margin_space": m} for s in selections for m in ("prob", "log-prob")]
    assert all_same(2, both, margin_anchor="initial")
    assert not all_same(3, both, margin_anchor="initial") and not all_same(2, both)
    unclipped: dict[str, Any] = {"clip": False, "margin_anchor": "initial"}
    assert all_same(2, selections, margin_space="log-prob", **unclipped)
    assert not all_same(2, selections, margin_space="prob", **unclipped)
