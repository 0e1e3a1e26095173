"""Losses of single tokens: what they are made of, worked out token by token."""

import math
from typing import Any

import pytest
import torch

from megatron_infifpo.distillation import chunk_binary_kl, ghost_kl, topk_standardised_l1
from megatron_infifpo.losses.tokens import TOKEN_LOSSES, soft_targets, top_values


def targets() -> dict[str, Any]:
    """Five tokens: two targets, a text of two tokens, one alone."""
    return {
        "soft_probs": torch.tensor([[0.6, 0.3], [0.5, 0.0], [0, 0], [0, 0], [0, 0]]).double(),
        "soft_tail": torch.tensor([0.1, 0.5, 1, 1, 1]).double(),
        "soft_sources": torch.tensor([1, 255, 0, 0, 0]),
        "chunk_rows": torch.tensor([2, 3, 2, 3]),
        "chunk_of": torch.tensor([0, 0, 1, 1]),
        "chunk_starts": torch.tensor([2, 2]),
        "chunk_logps": torch.tensor([-1.0, -4.0]).double(),
        "chunk_weights": torch.tensor([0.25, 0.75]).double(),
    }


def logprobs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    return z.log_softmax(-1)[:, :3].requires_grad_()


@pytest.mark.parametrize("tail", ["ghost", "renormalised"])
def test_token_by_token(tail):
    given, logps = targets(), logprobs()
    options: dict[str, Any] = {"lm_weight": 0.7, "tail": tail}
    options |= {"chunk_weight": 2, "chunk_temperature": 5}
    found = soft_targets(logps, **given, **options)
    expected = []
    for t in range(5):
        ce = -logps[t, 0].item()
        if t < 2:
            p, q = given["soft_probs"][t], logps[t, 1:].detach()
            kept = p > 0
            if tail == "ghost":
                rest = 1 - q[kept].exp().sum()
                kl = (p[kept] * (p[kept].log() - q[kept])).sum()
                kl = kl + given["soft_tail"][t] * (given["soft_tail"][t] / rest).log()
            else:
                p = p / p.sum()
                kl = (p[kept] * (p[kept].log() - q[kept])).sum()
            expected.append(0.7 * ce + 0.3 * kl.item())
        elif t == 2:
            whole = logps[2, 0] + logps[3, 0]
            texts = chunk_binary_kl(whole.expand(2), given["chunk_logps"], tau=5)
            both = (texts * given["chunk_weights"]).sum().item()
            expected.append(ce + 0.3 * 2 * both)
        else:
            expected.append(ce)
    assert found.losses.tolist() == pytest.approx(expected, abs=1e-12)
    sums = {name: part.values.sum().item() for name, part in found.parts.items()}
    counts = {name: part.counts.sum().item() for name, part in found.parts.items()}
    assert counts == {"ce": 5, "distance": 2, "chunk": 1}
    assert sums["ce"] == pytest.approx(-logps[:, 0].sum().item())
    assert 0.3 * sums["distance"] + 0.3 * 2 * sums["chunk"] == pytest.approx(
        sum(expected) - 0.7 * sums["ce"] - 0.3 * -logps[2:, 0].sum().item(), abs=1e-12
    )


def test_cross_entropy_alone_has_its_gradient_to_the_bit():
    given, logps = targets(), logprobs()
    plain = TOKEN_LOSSES["sft"].function(logps).losses
    (expected,) = torch.autograd.grad(plain.sum(), logps)
    values = torch.randn(5, 3, 2, dtype=torch.float64).sort(descending=True).values
    for found in (
        soft_targets(logps, **given, lm_weight=1.0).losses,
        top_values(logps, values, uld_weight=0.0).losses,
    ):
        (grad,) = torch.autograd.grad(found.sum(), logps)
        assert torch.equal(found, plain) and torch.equal(grad[:, 0], expected[:, 0])
        assert (grad == expected).all()


def test_several_targets_are_one_by_linearity():
    """`lm CE + sum w KL` has the gradient of one soft target, but for entropies."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(1, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(2, 6, generator=generator, dtype=torch.float64).softmax(-1)
    logps, zero = z.log_softmax(-1), torch.zeros(1, dtype=torch.float64)
    parts = 0.4 * -logps[0, 2] + sum(
        w * ghost_kl(logps, p[None], zero)[0] for w, p in zip((0.35, 0.25), probs, strict=True)
    )
    one = 0.35 * probs[0] + 0.25 * probs[1]
    one[2] += 0.4
    (expected,) = torch.autograd.grad(parts, z, retain_graph=True)
    (grad,) = torch.autograd.grad(ghost_kl(logps, one[None], zero)[0], z)
    torch.testing.assert_close(grad, expected, atol=1e-15, rtol=0)


def test_relabelled_ids_change_nothing():
    """The ids of both vocabularies are names: permuted with the targets, the same loss to a bit."""
    generator = torch.Generator().manual_seed(5)
    z = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    order = torch.randperm(9, generator=generator)
    ids = torch.stack([torch.randperm(9, generator=generator)[:2] for _ in range(5)])
    observed = torch.tensor([[3], [1], [4], [1], [5]])
    place = torch.empty(9, dtype=torch.int64)
    place[order] = torch.arange(9)
    losses = []
    for logits, names in ((z, torch.arange(9)), (z[:, order], place)):
        columns = names[torch.cat([observed, ids], dim=1)]
        logps = logits - logits.logsumexp(-1, keepdim=True)
        losses.append(soft_targets(logps.gather(1, columns), **targets()).losses)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-14, rtol=0)


def test_top_values_are_averaged_over_the_sources_that_have_some():
    logps = logprobs()
    values = -torch.rand(5, 3, 2, dtype=torch.float64).cumsum(-1)
    values[0, 1], values[1], values[2, :2] = math.nan, math.nan, math.nan
    found = top_values(logps, values, uld_weight=0.5, standardisation="none")
    for t in range(5):
        there = [m for m in range(3) if not values[t, m].isnan().any()]
        own = logps[t, 1:].softmax(-1)
        parts = [(own - values[t, m].softmax(-1)).abs().sum().item() for m in there]
        mean = sum(parts) / len(parts) if parts else 0.0
        assert found.losses[t].item() == pytest.approx(-logps[t, 0].item() + 0.5 * mean, abs=1e-12)
    (grad,) = torch.autograd.grad(found.losses.sum(), logps)
    assert grad.isfinite().all() and (grad[1, 1:] == 0).all()
    assert found.parts["distance"].counts.tolist() == [1, 0, 1, 1, 1]
    wide = -torch.rand(5, 3, 6, dtype=torch.float64).cumsum(-1)
    more = torch.randn(5, 9, dtype=torch.float64).log_softmax(-1).sort(descending=True).values
    losses = {}
    for kind in ("unbiased", "biased"):
        losses[kind] = top_values(more[:, :7], wide, uld_temperature=2, standardisation=kind)
        one = topk_standardised_l1(
            more[:, 1:7], wide[:, 1], temperature=2, unbiased=kind == "unbiased"
        )
        alone = top_values(more[:, :7], wide[:, 1:2], uld_temperature=2, standardisation=kind)
        torch.testing.assert_close(alone.parts["distance"].values, one)
    assert not torch.equal(losses["biased"].losses, losses["unbiased"].losses)
