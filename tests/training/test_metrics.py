"""Metrics are sums with counts: totals, domains, sources."""

import torch

from megatron_infifpo.losses.tokens import Part, TokenLosses
from megatron_infifpo.methods import resolve
from megatron_infifpo.training.metrics import preference_metrics, token_metrics
from megatron_infifpo.training.objective import pair_losses

SOURCES, DOMAINS = ("a", "b"), ("code", "math", "law")


def values(metrics: dict, name: str) -> tuple[float, float]:
    total, count = metrics[name].tolist()
    return total, count


def make_row(pairs: int = 4) -> dict:
    generator = torch.Generator().manual_seed(3)
    counts = torch.full((pairs, 2), 2)
    return {
        "token_counts": counts,
        "initial_sum_logps": -torch.rand(pairs, 2, generator=generator),
        "source_sum_logps": -torch.rand(pairs, 2, 2, generator=generator),
        "source_token_counts": torch.full((pairs, 2, 2), 3),
        "source_mask": torch.tensor([[True, True], [True, False], [True, True], [False, False]]),
        "domain_codes": torch.tensor([0, 1, 0, 1]),
    }


def run(row, name="infifpo", **options):
    method = resolve(name, **options)
    policy_sums = row["initial_sum_logps"] * 1.5
    losses, policy, reference = pair_losses(method, row, policy_sums)
    metrics = preference_metrics(method, row, policy, reference, losses, SOURCES, DOMAINS)
    return metrics, losses, policy, reference


def test_totals_and_domains():
    row = make_row()
    metrics, losses, policy, reference = run(row)
    total, count = values(metrics, "loss")
    torch.testing.assert_close(torch.tensor(total), losses.sum())
    assert count == 4
    code = torch.tensor([True, False, True, False])
    for name, inside in (("code", code), ("math", ~code)):
        total, count = values(metrics, f"domain/{name}/loss")
        torch.testing.assert_close(torch.tensor(total), losses[inside].sum())
        assert count == 2
        total, count = values(metrics, f"domain/{name}/logps/accuracy")
        assert (total, count) == ((policy[inside, 0] > policy[inside, 1]).sum().item(), 2)
        total, _ = values(metrics, f"domain/{name}/share/a")
        expected = reference.weights[inside][..., 0].mean(1).sum()
        torch.testing.assert_close(torch.tensor(total), expected)
    # A domain that no pair of the step is of: 0 of 0, which Megatron averages to NaN, a gap.
    assert values(metrics, "domain/law/loss") == (0.0, 0.0)


def test_sources():
    row = make_row()
    metrics, _, _, reference = run(row)
    for index, name in enumerate(SOURCES):
        total, count = values(metrics, f"clip-rate/{name}")
        assert count == 2 * row["source_mask"][:, index].sum()
        assert total == reference.clipped[..., index].sum()
    assert values(metrics, "clip-rate")[1] == 10
    shares = sum(values(metrics, f"share/{name}")[0] for name in SOURCES)
    assert abs(shares - 3) < 1e-6, "three of the four pairs have a source"


def test_initial_pivot_as_a_source():
    row = make_row()
    method = resolve("infifpo", initial_as_source=True)
    losses, policy, reference = pair_losses(method, row, row["initial_sum_logps"] * 1.5)
    names = (*SOURCES, "initial")
    metrics = preference_metrics(method, row, policy, reference, losses, names, DOMAINS)
    assert abs(sum(values(metrics, f"share/{name}")[0] for name in names) - 4) < 1e-6
    assert values(metrics, "clip-rate")[1] == 10 and "clip-rate/initial" not in metrics


def test_what_is_left_out():
    row = make_row()
    plain, *_ = run(row, "dpo")
    assert not any("share" in name or "clip" in name for name in plain)
    unclipped, *_ = run(row, clip=False)
    assert "clip-rate" not in unclipped and "share/a" in unclipped
    _, losses, policy, reference = run(row, "dpo")
    one_domain = preference_metrics(
        resolve("dpo"), row, policy, reference, losses, SOURCES, ("code",)
    )
    assert not any(name.startswith("domain/") for name in one_domain)


def token_row() -> dict:
    """Three responses of 2, 3 and 5 tokens."""
    counts = torch.tensor([2, 3, 5])
    return {
        "domain_codes": torch.tensor([0, 1, 0]),
        "token_counts": counts[:, None],
        "segment_ids": torch.arange(3).repeat_interleave(counts),
    }


def test_sft_weighs_tokens():
    sums = torch.tensor([-2.0, -9.0, -1.0])
    found = TokenLosses(torch.tensor([1.0, 1, 3, 3, 3, 0, 0, 0, 0, 1]), {})
    metrics = token_metrics(token_row(), found, sums, (), DOMAINS)
    assert values(metrics, "loss") == (12.0, 10.0)
    assert values(metrics, "domain/code/loss") == (3.0, 7.0)
    total, count = values(metrics, "logps/chosen")
    assert abs(total - (-1 - 3 - 0.2)) < 1e-6 and count == 3
    assert metrics.keys() == {
        "loss",
        "logps/chosen",
        "domain/code/loss",
        "domain/math/loss",
        "domain/law/loss",
    }


def test_what_sources_teach():
    row = token_row() | {"soft_sources": torch.tensor([1, 0, 2, 2, 0, 0, 0, 1, 255, 0])}
    taught = (row["soft_sources"] > 0).float()
    ones, numbers = torch.ones(10), torch.arange(10.0)
    chunk = Part(torch.zeros(10), torch.zeros(10))
    parts = {"ce": Part(ones, ones), "distance": Part(numbers * taught, taught), "chunk": chunk}
    found = TokenLosses(torch.ones(10), parts)
    metrics = token_metrics(row, found, -torch.ones(3), ("a", "initial"), DOMAINS)
    assert values(metrics, "distance") == (0 + 2 + 3 + 7 + 8, 5)
    assert values(metrics, "domain/math/distance") == (5, 2)
    assert values(metrics, "taught") == (5, 10) and values(metrics, "domain/code/taught") == (3, 7)
    assert values(metrics, "share/a") == (2, 5) and values(metrics, "share/initial") == (2, 5)
    assert values(metrics, "share/several") == (1, 5)
    assert values(metrics, "domain/code/share/a") == (2, 3)
    assert values(metrics, "chunk") == (0, 0), "a gap, not a number"
