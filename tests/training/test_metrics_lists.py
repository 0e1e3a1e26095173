"""Metrics of lists are sums with counts: over prompts, over responses, over what a source knows."""

from typing import Any

import pytest
import torch

from megatron_infifpo.methods import resolve
from megatron_infifpo.training.metrics import preference_metrics
from megatron_infifpo.training.objective import pair_losses
from support.list_rows import DOMAINS, LENGTHS, SOURCES, list_row, policy_sums


def run(row: dict, name: str = "fuserlhf", **options: Any) -> tuple[dict, torch.Tensor, Any]:
    method = resolve(name, **options)
    losses, policy, reference = pair_losses(method, row, policy_sums(row))
    names = (*SOURCES, "initial") if method.fused and method.initial_as_source else SOURCES
    metrics = preference_metrics(method, row, policy, reference, losses, names, DOMAINS)
    for value in metrics.values():
        assert value.dtype == torch.float32 and value.shape == (2,) and value.isfinite().all()
    return {name: tuple(value.tolist()) for name, value in metrics.items()}, losses, reference


def close(total: float, count: int) -> tuple[Any, int]:
    return (pytest.approx(total, rel=1e-5, abs=1e-6), count)


def test_over_responses_and_over_prompts():
    row = list_row()
    metrics, losses, reference = run(row, beta=0.3)
    there = row["valid"]
    policy = policy_sums(row)
    assert there.sum() == 10
    assert metrics["loss"] == close(losses.sum().item(), 4)
    assert metrics["reward"] == close(row["rewards"][there].sum().item(), 10)
    assert metrics["length"] == close(row["token_counts"].sum().item(), 10)
    assert metrics["no-end-of-turn"] == (10 - row["ended"].sum(), 10)
    residuals = row["rewards"] - 0.3 * (policy - reference.logps)
    spread = sum(residuals[b, :n].std().item() for b, n in enumerate(LENGTHS.tolist()) if n > 1)
    assert metrics["residual/std"] == close(spread, 4)


@pytest.mark.parametrize("name", ["fuserlhf", "pad"])
@pytest.mark.parametrize("means", [False, True])
def test_distances_are_nats_a_response(name, means):
    """Sums less sums, whatever the method compares; each source where it takes part."""
    row = list_row()
    metrics, _, _ = run(row, name, length_normalization=means)
    away = policy_sums(row)[..., None] - row["source_sum_logps"]
    second = row["valid"] & row["source_mask"][:, 1:]
    assert metrics["kl/a"] == close(away[..., 0].sum().item(), 10)
    assert metrics["kl/b"] == close(away[..., 1][second].sum().item(), 8)
    initial = policy_sums(row) - row["initial_sum_logps"]
    assert metrics["kl/initial"] == close(initial.sum().item(), 10)


def test_shares_and_clipping():
    row = list_row()
    metrics, _, reference = run(row, clip=True)
    # Of 8 responses .2, .3, .5; of 2 without the second source.
    assert metrics["share/b"] == close(8 * 0.3, 10)
    assert metrics["share/a"] == close(8 * 0.2 + 2 * 0.2 / 0.7, 10)
    assert metrics["share/initial"] == close(8 * 0.5 + 2 * 0.5 / 0.7, 10)
    assert metrics["clip-rate/a"] == (reference.clipped[..., 0].sum(), 10)
    assert metrics["clip-rate/b"] == (reference.clipped[..., 1].sum(), 8)
    assert metrics["clip-rate"][1] == 18 and "clip-rate/initial" not in metrics
    unclipped, _, _ = run(row)
    assert not any(name.startswith("clip-rate") for name in unclipped)
    alone, _, _ = run(row, reference="initial")
    assert not any(name.startswith("share/") for name in alone)
    assert "kl/a" in alone, "how far the sources are can be asked without them as a reference"


def test_domains():
    row = list_row()
    metrics, losses, _ = run(row)
    code = torch.tensor([True, False, True, False])
    rewards = torch.where(row["valid"], row["rewards"], 0.0)
    for domain, inside, responses in (("code", code, 7), ("math", ~code, 3)):
        assert metrics[f"domain/{domain}/loss"] == close(losses[inside].sum().item(), 2)
        expected = rewards[inside].sum().item()
        assert metrics[f"domain/{domain}/reward"] == close(expected, responses)
        assert metrics[f"domain/{domain}/share/b"][1] == responses
    both = [metrics[f"domain/{domain}/residual/std"][0] for domain in ("code", "math")]
    assert metrics["residual/std"] == close(sum(both), 4)
    assert metrics["domain/law/reward"] == (0, 0), "a gap"


def test_pad_has_no_reward_and_the_spread_of_its_own_difference():
    row = list_row()
    metrics, _, reference = run(row, "pad", beta=4.0)
    means = policy_sums(row) / row["token_counts"].clamp_min(1)
    away = 4 * (means - reference.logps)
    spread = sum(away[b, :n].std().item() for b, n in enumerate(LENGTHS.tolist()) if n > 1)
    assert metrics["residual/std"] == close(spread, 4)
    assert "reward" not in metrics and not any("rewards/" in name for name in metrics)
