"""References of lists: given weights, absent responses, responses that are better than others."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_infifpo.reference import FUSIONS, FusedReference, fuse_reference
from megatron_infifpo.source_values import clip_sources

NAN = math.nan
R, M = 4, 3
VALID = torch.tensor([[True] * 4, [True, True, True, False], [False, True, False, True]])
PREFERRED = torch.tensor([[True, False, False, True], [False, True, True, True], [False] * 4])


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(*shape, generator=generator, dtype=torch.float64)


def fuse(sources: Tensor, initial: Tensor | None = None, **options: Any) -> FusedReference:
    """Unclipped and weighted, if not said otherwise."""
    initial = random(*sources.shape[:2], seed=1) if initial is None else initial
    usual: dict[str, Any] = {"fusion": "weighted", "clip": False, "preferred": PREFERRED}
    return fuse_reference(sources, initial, policy_logps=initial - 0.3, **(usual | options))


def test_given_weights():
    sources = torch.tensor([[[-1.0, -2.0], [-4.0, -8.0]], [[-3.0, -1.0], [0.0, -1.0]]]).double()
    weights = torch.tensor([0.9, 2.1], dtype=torch.float64)  # 0.3 and 0.7
    options: Any = {"preferred": torch.tensor([True, False])}
    fused = fuse(sources, source_weights=weights, **options)
    expected = torch.tensor([[-1.7, -6.8], [-1.6, -0.7]], dtype=torch.float64)
    torch.testing.assert_close(fused.logps, expected, atol=1e-15, rtol=0)
    each = torch.stack([weights, weights.flip(0)])
    other = fuse(sources, source_weights=each, **options)
    assert torch.equal(other.logps[0], fused.logps[0])
    torch.testing.assert_close(other.logps[1], torch.tensor([-2.4, -0.3], dtype=torch.float64))
    # Of the second record only the first source takes part; then only one without weight.
    mask = torch.tensor([[True, True], [True, False]])
    torch.testing.assert_close(
        fuse(sources, source_weights=weights, source_mask=mask, **options).logps[1],
        sources[1, :, 0],
    )
    weights = torch.tensor([0.0, 2.0])
    initial = random(2, 2, seed=5)
    fused = fuse(sources, initial, source_weights=weights, source_mask=mask, **options)
    assert torch.equal(fused.logps[1], initial[1]) and (fused.weights[1] == 0).all()
    assert torch.equal(fused.logps[0], sources[0, :, 1])


@pytest.mark.parametrize("clip", [False, True])
def test_weights_tell_no_more_than_shares(clip):
    """Copies are one source; one of weight 0 is absent, whatever it says; 1, 1, 1 is average."""
    sources = random(3, R, M)
    ones = torch.ones(M)
    plain = fuse(sources, source_weights=ones, clip=clip)
    torch.testing.assert_close(plain.logps, fuse(sources, fusion="average", clip=clip).logps)
    copies = sources[..., :1].expand(-1, -1, M)
    torch.testing.assert_close(
        fuse(copies, source_weights=torch.tensor([0.1, 0.2, 5.0]), clip=clip).logps,
        fuse(sources[..., :1], source_weights=torch.ones(1), clip=clip).logps,
    )
    some = torch.tensor([0.5, 0.0, 1.5])
    without = fuse(sources[..., [0, 2]], source_weights=some[[0, 2]], clip=clip)
    for value in (-math.inf, -1e30, -1.0):
        odd = sources.clone()
        odd[..., 1] = value
        found = fuse(odd, source_weights=some, clip=clip)
        torch.testing.assert_close(found.logps, without.logps)


@pytest.mark.parametrize("space", ["prob", "log-prob"])
@pytest.mark.parametrize("selection", ["response", "pair"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_absent_responses_might_as_well_not_be_there(fusion, clip, selection, space):
    """They have no say in which source is chosen for all of a record, either."""
    options: dict[str, Any] = {"fusion": fusion, "clip": clip}
    options |= {"selection": selection, "margin_space": space}
    if fusion == "weighted":
        options["source_weights"] = torch.tensor([0.2, 0.3, 0.5])
    sources, initial = random(3, R, M), random(3, R, seed=1)
    expected = fuse(sources, initial, valid=torch.ones_like(VALID), **options)
    assert torch.equal(expected.logps, fuse(sources, initial, **options).logps)
    for filler in (NAN, math.inf, -1e30):
        found = fuse(
            torch.where(VALID[..., None], sources, filler),
            torch.where(VALID, initial, filler),
            valid=VALID,
            **options,
        )
        assert (found.logps[~VALID] == 0).all() and (found.weights[~VALID] == 0).all()
        for b, there in enumerate(VALID):
            alone = fuse(
                sources[b : b + 1, there], initial[b : b + 1, there],
                **(options | {"preferred": PREFERRED[b : b + 1, there]}),
            )  # fmt: skip
            torch.testing.assert_close(found.logps[b, there], alone.logps[0])
            torch.testing.assert_close(found.weights[b, there], alone.weights[0])
        if clip:
            assert found.clipped is not None and not found.clipped[~VALID].any()


def test_each_list_has_its_own_better_responses():
    sources, initial = random(3, R, M), random(3, R, seed=1)
    clipped = clip_sources(sources, initial, PREFERRED)
    for b in range(3):
        for r in range(R):
            bound = torch.maximum if PREFERRED[b, r] else torch.minimum
            assert torch.equal(clipped[b, r], bound(sources[b, r], initial[b, r]))
    # One for all records is as before.
    same = clip_sources(sources, initial, PREFERRED[0])
    assert torch.equal(same, clip_sources(sources, initial, PREFERRED[:1].expand(3, -1)))


def test_weights_are_given_where_they_have_an_effect():
    sources = random(3, R, M)
    with pytest.raises(ValueError, match="the fusion 'weighted' needs source_weights"):
        fuse(sources)
    with pytest.raises(ValueError, match="source_weights has no effect for the fusion 'average'"):
        fuse(sources, fusion="average", source_weights=torch.ones(M))
    with pytest.raises(ValueError, match=r"source_weights is \[4\], expected \[3\] or \[3, 3\]"):
        fuse(sources, source_weights=torch.ones(4))
