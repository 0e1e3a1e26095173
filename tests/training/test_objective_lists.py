"""Lists from summed log-probs to losses: FuseRLHF, PAD, and what an absent response changes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_infifpo.losses import group_regression, plackett_luce
from megatron_infifpo.methods import resolve
from megatron_infifpo.training.objective import pair_losses, references
from support.list_rows import LENGTHS, list_row, policy_sums

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("fuserlhf", {}),
    ("fuserlhf", {"clip": True}),
    ("fuserlhf", {"length_normalization": True, "reward_normalization": "group"}),
    ("fuserlhf", {"reference": "initial"}),
    ("fuserlhf", {"fusion": "max-margin", "selection": "pair"}),
    ("pad", {}),
    ("pad", {"divergence": "jsd", "fusion": "weighted"}),
    ("pad", {"length_normalization": False}),
]


def mixed(row: dict, first: Tensor, second: Tensor, own: Tensor) -> Tensor:
    """gamma .2, .3, .5; .2 and .5 of 1 where the second source is masked."""
    both = 0.2 * first + 0.3 * second + 0.5 * own
    alone = (0.2 * first + 0.5 * own) / 0.7
    return torch.where(row["source_mask"][:, 1:], both, alone)


def test_fuserlhf():
    """R = r - beta (log pi - sum of gamma log M), over the prompt's responses."""
    row, beta = list_row(), 0.3
    policy = policy_sums(row)
    losses, logps, reference = pair_losses(resolve("fuserlhf", beta=beta), row, policy)
    first, second = row["source_sum_logps"].unbind(-1)
    fused = mixed(row, first, second, row["initial_sum_logps"])
    assert torch.equal(logps, policy)
    torch.testing.assert_close(reference.logps, fused, atol=1e-7, rtol=0)
    residuals = row["rewards"] - beta * (policy - fused)
    for b, n in enumerate(LENGTHS.tolist()):
        expected = residuals[b, :n].var() / (2 * beta) if n > 1 else torch.zeros(())
        assert losses[b].item() == pytest.approx(expected.item(), rel=1e-6)


def test_without_sources_the_initial_pivot_has_all_the_weight():
    row = list_row()
    plain = resolve("fuserlhf", reference="initial")
    row["source_weights"] = torch.tensor([[0.0, 0.0, 2.0]]).expand(4, -1)
    policy = policy_sums(row)
    for a, b in zip(
        pair_losses(resolve("fuserlhf"), row, policy)[:2],
        pair_losses(plain, row, policy)[:2],
        strict=True,
    ):
        assert torch.equal(a, b)
    # Without its weight the sources alone are the reference.
    alone = references(resolve("fuserlhf", initial_as_source=False), row, policy)
    assert torch.equal(alone.logps, row["initial_sum_logps"]), "theirs are 0"


def test_clipping_goes_by_the_sign_of_the_advantage():
    """Above the prompt's mean reward a source may only raise the reference, else only lower it."""
    row = list_row()
    method = resolve("fuserlhf", clip=True, initial_as_source=False)
    row["rewards"][2] = torch.tensor([0.7, 0.7, 0.7, 0.0])  # none is above: all are lowered
    found = references(method, row, policy_sums(row))
    initial = row["initial_sum_logps"]
    for b, n in enumerate(LENGTHS.tolist()):
        mean = row["rewards"][b, :n].double().mean()
        for r in range(n):
            bound = torch.maximum if row["rewards"][b, r] > mean and b != 2 else torch.minimum
            clipped = bound(row["source_sum_logps"][b, r], initial[b, r])
            mask = row["source_mask"][b]
            weights = row["source_weights"][b, :2] * mask
            expected = (weights * clipped).sum() / weights.sum()
            torch.testing.assert_close(found.logps[b, r], expected)
    assert found.clipped is not None and found.clipped.any()
    raised = references(resolve("fuserlhf", initial_as_source=False), row, policy_sums(row))
    assert (found.logps[2, :3] <= raised.logps[2, :3]).all()


def test_of_equal_rewards_none_is_above_the_mean():
    """In float32 the mean of seven times 0.7 is less than 0.7."""
    ones = torch.ones(1, 7)
    rewards = 0.7 * ones
    assert (rewards > rewards.sum() / 7).any(), "the trap"
    row = {
        "token_counts": ones, "initial_sum_logps": -2 * ones,
        "source_token_counts": ones[..., None], "source_sum_logps": -ones[..., None],
        "source_mask": torch.ones(1, 1, dtype=torch.bool),
        "source_weights": torch.ones(1, 2), "rewards": rewards, "valid": ones.bool(),
    }  # fmt: skip
    method = resolve("fuserlhf", clip=True, initial_as_source=False)
    found = references(method, row, -ones)
    assert (found.logps == -2).all(), "no source raises any"


def test_pad():
    """Scores are beta times means; the teacher's the mean of the sources that take part."""
    row = list_row()
    policy = policy_sums(row)
    losses, means, reference = pair_losses(resolve("pad"), row, policy)
    own = policy / row["token_counts"].clamp_min(1)
    first, second = (row["source_sum_logps"] / row["source_token_counts"]).unbind(-1)
    teacher = torch.where(row["source_mask"][:, 1:], (first + second) / 2, first)
    torch.testing.assert_close(means, own)
    torch.testing.assert_close(reference.logps, torch.where(row["valid"], teacher, 0.0))
    for b, n in enumerate(LENGTHS.tolist()):
        expected = plackett_luce(10 * own[b : b + 1, :n], 10 * teacher[b : b + 1, :n])
        assert losses[b].item() == pytest.approx(expected.item(), abs=1e-12)
    assert (losses[:3] > 0.01).all() and losses[3] == 0


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_absent_responses_change_nothing(name, options):
    """Losses and gradients are those of each prompt on its own, without empty places."""
    method = resolve(name, **options)
    row = list_row()
    policy = policy_sums(row).requires_grad_()
    losses, _, _ = pair_losses(method, row, policy)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    dirty = list_row(filler=math.nan)
    found, _, _ = pair_losses(method, dirty, policy)
    (same,) = torch.autograd.grad(found.sum(), policy)
    if method.fused:  # of the initial pivot alone the loss itself puts them aside
        assert torch.equal(references(method, dirty, policy).logps[~row["valid"]], torch.zeros(6))
    assert torch.equal(found, losses) and torch.equal(same, grad)
    assert (grad[~row["valid"]] == 0).all() and grad.abs().max() > 0
    for b, n in enumerate(LENGTHS.tolist()):
        if n < 2:
            assert losses[b] == 0 and (grad[b] == 0).all()
            continue
        one = {
            key: value[b : b + 1, :n] if value.dim() > 1 and "mask" not in key and "weights" not in
            key else value[b : b + 1] for key, value in row.items()
        }  # fmt: skip
        own = policy[b : b + 1, :n].detach().requires_grad_()
        alone, _, _ = pair_losses(method, one, own)
        (expected,) = torch.autograd.grad(alone.sum(), own)
        torch.testing.assert_close(losses[b : b + 1], alone, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(grad[b : b + 1, :n], expected, atol=1e-12, rtol=1e-12)


def test_options_reach_the_loss():
    row = list_row()
    policy = policy_sums(row)
    means = policy / row["token_counts"].clamp_min(1)
    scaled = resolve("fuserlhf", reward_scale=3.0, reward_normalization="group", beta=0.2)
    losses, _, reference = pair_losses(scaled, row, policy)
    arguments: dict[str, Any] = {
        "beta": 0.2, "valid": row["valid"], "reward_scale": 3.0, "reward_normalization": "group",
    }  # fmt: skip
    expected = group_regression(policy, reference.logps, row["rewards"], **arguments)
    assert torch.equal(losses, expected)
    other = resolve("pad", divergence="jsd", beta=4.0)
    losses, _, reference = pair_losses(other, row, policy)
    expected = plackett_luce(4 * means, 4 * reference.logps, divergence="jsd", valid=row["valid"])
    assert torch.equal(losses, expected)
