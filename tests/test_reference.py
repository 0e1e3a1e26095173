"""Fused references against the paper's worked example, closed forms and invariants."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.losses import preference_loss
from megatron_infifpo.reference import FUSIONS, fuse_reference, log_probability_margin
from megatron_infifpo.source_values import clip_sources

PREFERRED = torch.tensor([True, False])


def weights_for(fusion: str, sources: int) -> dict:
    """What a fusion reads of a row, for M sources."""
    return {"source_weights": torch.arange(1.0, sources + 1)} if fusion == "weighted" else {}


@pytest.fixture(scope="module")
def golden(shared_data):
    return json.loads((shared_data.parent / "golden" / "published_example.json").read_text())


def pair(values: dict) -> torch.Tensor:
    return torch.tensor([[values["chosen"], values["rejected"]]], dtype=torch.float64)


# name in the golden file -> objective, fusion, clip
CASES = {
    "pivot only (DPO on means)": ("dpo", None, True),
    "clip, max-margin": ("dpo", "max-margin", True),
    "clip, average": ("dpo", "average", True),
    "clip, confidence": ("dpo", "confidence", True),
    "no clip, max-margin": ("dpo", "max-margin", False),
    "no clip, average": ("dpo", "average", False),
    "clip, max-margin, drifted policy": ("dpo", "max-margin", True),
    "no clip, max-margin, drifted policy": ("dpo", "max-margin", False),
    "IPO with the clipped max-margin reference, beta 0.1": ("ipo", "max-margin", True),
}


@pytest.mark.parametrize("name", CASES)
def test_published_example(golden, name):
    case = next(c for c in golden["cases"] if c["name"] == name)
    objective, fusion, clip = CASES[name]
    initial = pair(golden["initial"])
    policy = pair(case.get("policy", golden["initial"]))
    reference = initial
    if fusion is not None:
        sources = torch.stack(
            [
                torch.tensor(golden["sources"][r], dtype=torch.float64)
                for r in ("chosen", "rejected")
            ]
        )[None]
        fused = fuse_reference(sources, initial, policy, PREFERRED, fusion=fusion, clip=clip)
        reference = fused.logps
        if "selected" in case:
            assert fused.weights[0].argmax(-1).tolist() == list(case["selected"].values())
        if "reference" in case:
            assert reference[0].tolist() == pytest.approx(
                list(case["reference"].values()), abs=1e-12
            )
    beta = 0.1 if objective == "ipo" else golden["beta"]
    loss = preference_loss(objective, policy, reference, beta=beta)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-12)


def test_every_golden_case_is_tested(golden):
    assert {case["name"] for case in golden["cases"]} == set(CASES)


def test_margin_of_sums_does_not_underflow(golden):
    """exp of the published sums (-104) is 0 in float32, and so would every margin be."""
    sources = torch.tensor(golden["sources_sum"]["chosen"], dtype=torch.float32) * 10
    margins = log_probability_margin(sources, torch.tensor(-1100.0))
    assert torch.isfinite(margins).all()
    assert margins.argmax().item() == 0


def test_margin_matches_the_definition():
    a, b = torch.rand(100, dtype=torch.float64) * -3, torch.rand(100, dtype=torch.float64) * -3
    expected = (a.exp() - b.exp()).abs().log()
    torch.testing.assert_close(log_probability_margin(a, b), expected, atol=1e-12, rtol=0)
    assert log_probability_margin(a, a).eq(-math.inf).all()
    # exp(-1 + 1e-12) - exp(-1): the naive difference keeps only four digits here.
    tiny = log_probability_margin(
        torch.tensor(-1 + 1e-12, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    )
    assert tiny.item() == pytest.approx(math.log((-1 + 1e-12) - (-1.0)) - 1, abs=1e-9)


log_prob = st.floats(-20, 0, allow_nan=False).map(lambda x: round(x, 6))


@st.composite
def problems(draw):
    """Random sources `[B, 2, M]`, initial and policy `[B, 2]`, and a mask `[B, M]`."""
    pairs, sources = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def tensor(*shape):
        count = math.prod(shape)
        values = draw(st.lists(log_prob, min_size=count, max_size=count))
        return torch.tensor(values, dtype=torch.float64).view(shape)

    mask = draw(st.lists(st.booleans(), min_size=pairs * sources, max_size=pairs * sources))
    return (
        tensor(pairs, 2, sources),
        tensor(pairs, 2),
        tensor(pairs, 2),
        torch.tensor(mask).view(pairs, sources),
    )


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from(list(FUSIONS)), st.booleans())
def test_masked_sources_take_no_part(problem, fusion, clip):
    sources, initial, policy, mask = problem
    options = {"fusion": fusion, "clip": clip, "source_mask": mask}
    options |= weights_for(fusion, sources.shape[-1])
    fused = fuse_reference(sources, initial, policy, PREFERRED, **options)
    garbage = torch.where(mask[:, None, :], sources, math.nan)
    same = fuse_reference(garbage, initial, policy, PREFERRED, **options)
    assert torch.equal(fused.logps, same.logps) and torch.equal(fused.weights, same.weights)
    assert (fused.weights[~mask[:, None, :].expand_as(sources)] == 0).all()
    without = ~mask.any(-1)
    assert torch.equal(fused.logps[without], initial[without])
    with_sources = fused.weights[~without].sum(-1)
    torch.testing.assert_close(with_sources, torch.ones_like(with_sources))


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from(list(FUSIONS)))
def test_permuting_sources_changes_nothing(problem, fusion):
    sources, initial, policy, mask = problem
    order = torch.randperm(sources.shape[-1])
    read = weights_for(fusion, sources.shape[-1])
    fused = fuse_reference(
        sources, initial, policy, PREFERRED, fusion=fusion, source_mask=mask, **read
    )
    read = {name: value[order] for name, value in read.items()}
    permuted = fuse_reference(
        sources[..., order], initial, policy, PREFERRED, fusion=fusion,
        source_mask=mask[:, order], **read,
    )  # fmt: skip
    if fusion == "max-margin":
        # Ties may go to another source: then the two margins are equal.
        margins = (fused.logps.exp() - policy.exp()).abs()
        torch.testing.assert_close(margins, (permuted.logps.exp() - policy.exp()).abs())
    else:
        torch.testing.assert_close(fused.logps, permuted.logps)


@settings(deadline=None, max_examples=100)
@given(problems(), st.booleans())
def test_one_source_makes_all_fusions_equal(problem, clip):
    sources, initial, policy, _ = problem
    fused = [
        fuse_reference(
            sources[..., :1], initial, policy, PREFERRED, fusion=f, clip=clip, **weights_for(f, 1)
        ).logps
        for f in FUSIONS
    ]
    assert all(torch.equal(fused[0], other) for other in fused[1:])


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from(list(FUSIONS)))
def test_clipping_bounds_the_first_loss(problem, fusion):
    """With clipping every reference is on the far side of the initial pivot: loss >= ln 2."""
    sources, initial, _, mask = problem
    read = weights_for(fusion, sources.shape[-1])
    fused = fuse_reference(
        sources, initial, initial, PREFERRED, fusion=fusion, source_mask=mask, **read
    )
    loss = preference_loss("dpo", initial, fused.logps, beta=2.5)
    assert (loss >= math.log(2) - 1e-12).all()


@given(problems())
def test_clipping_is_monotone_and_idempotent(problem):
    sources, initial, _, _ = problem
    clipped = clip_sources(sources, initial, PREFERRED)
    assert (clipped[:, 0] >= sources[:, 0]).all() and (clipped[:, 1] <= sources[:, 1]).all()
    assert torch.equal(clip_sources(clipped, initial, PREFERRED), clipped)


def test_first_index_wins_ties():
    values = torch.full((1, 2, 3), -1.0)
    fused = fuse_reference(values, values[..., 0], values[..., 0] - 1, PREFERRED)
    assert fused.weights.argmax(-1).tolist() == [[0, 0]]
    masked = fuse_reference(
        values, values[..., 0], values[..., 0], PREFERRED,
        source_mask=torch.tensor([[False, True, True]]),
    )  # fmt: skip
    assert masked.weights.argmax(-1).tolist() == [[1, 1]], "a zero margin still beats a masked one"


def test_one_source_a_pair():
    """Response 0 prefers source 0, response 1 prefers source 1 by more: the pair takes source 1."""
    sources = torch.tensor([[[-1.2, -1.0], [-2.0, -0.1]]])
    policy = torch.tensor([[-1.0, -2.0]])
    by_response = fuse_reference(sources, policy, policy, PREFERRED, clip=False)
    by_pair = fuse_reference(sources, policy, policy, PREFERRED, clip=False, selection="pair")
    assert by_response.weights.argmax(-1).tolist() == [[0, 1]]
    assert by_pair.weights.argmax(-1).tolist() == [[1, 1]]


def test_certain_source_takes_the_limit_of_confidence():
    sources = torch.tensor([[[0.0, -1.0], [-2.0, -1.0]]])
    fused = fuse_reference(
        sources, torch.full((1, 2), -9.0), torch.zeros(1, 2), PREFERRED, fusion="confidence",
        clip=False,
    )  # fmt: skip
    torch.testing.assert_close(fused.weights, torch.tensor([[[1.0, 0.0], [1 / 3, 2 / 3]]]))


def test_gradient_flows_through_the_policy_only():
    policy = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    sources = torch.tensor([[[-0.5], [-3.0]]], requires_grad=True)
    fused = fuse_reference(sources, policy.detach(), policy, PREFERRED)
    preference_loss("dpo", policy, fused.logps, beta=2.5).sum().backward()
    assert sources.grad is None
    margin = 2.5 * ((-1.0 + 0.5) - (-2.0 + 3.0))
    expected = -2.5 / (1 + math.exp(margin))
    torch.testing.assert_close(policy.grad, torch.tensor([[expected, -expected]]))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("space", ["prob", "log-prob"])
def test_extreme_log_probs_stay_finite(fusion, space):
    """Every combination of log-probs from -1e4 to 0, for two sources, initial pivot and policy."""
    values = torch.tensor([-1e4, -300.0, -1.0, -1e-30, 0.0])
    grid = torch.cartesian_prod(*[values] * 4)
    sources = grid[:, None, :2].expand(-1, 2, -1)
    initial, policy = (grid[:, i : i + 1].expand(-1, 2) for i in (2, 3))
    options = {"margin_space": space} if fusion == "max-margin" else weights_for(fusion, 2)
    for clip in (True, False):
        fused = fuse_reference(
            sources, initial, policy, PREFERRED, fusion=fusion, clip=clip, **options
        )
        assert torch.isfinite(fused.logps).all()
        torch.testing.assert_close(fused.weights.sum(-1), torch.ones(len(grid), 2))


@settings(deadline=None, max_examples=200)
@given(problems(), st.sampled_from(list(FUSIONS)), st.booleans())
def test_fusion_renormalises_over_the_sources_that_take_part(problem, fusion, clip):
    """A source that is restricted to other domains might as well not be there."""
    sources, initial, policy, mask = problem
    options: Any = {"fusion": fusion, "clip": clip}
    read = weights_for(fusion, sources.shape[-1])
    fused = fuse_reference(
        sources, initial, policy, PREFERRED, source_mask=mask, **(options | read)
    )
    for b in range(len(sources)):
        if not mask[b].any():
            continue
        rows = (sources[b : b + 1][..., mask[b]], initial[b : b + 1], policy[b : b + 1])
        some = {name: value[mask[b]] for name, value in read.items()}
        alone = fuse_reference(*rows, PREFERRED, **(options | some))
        torch.testing.assert_close(fused.logps[b : b + 1], alone.logps)
        torch.testing.assert_close(fused.weights[b : b + 1][..., mask[b]], alone.weights)


def test_bad_arguments_say_what_was_expected():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="max-margin, average, confidence, weighted"):
        fuse_reference(zeros[..., None], zeros, zeros, PREFERRED, fusion="best")
    with pytest.raises(ValueError, match=r"expected initial_logps"):
        fuse_reference(zeros[..., None], zeros[:, :1], zeros, PREFERRED)


def test_losses_need_only_torch():
    """Losses, fusion and methods are used from notebooks: they must not drag Megatron in."""
    import subprocess
    import sys

    code = (
        "import sys, megatron_infifpo.losses, megatron_infifpo.reference, megatron_infifpo.methods;"
        "assert not any(m.split('.')[0] in ('megatron', 'transformers') for m in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
