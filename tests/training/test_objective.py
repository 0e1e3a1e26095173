"""From summed log-probs to losses: bounds, the paper's gradient analysis, options."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.losses import CHOSEN, PIVOT_CHOSEN, REJECTED
from megatron_infifpo.methods import METHODS, resolve
from megatron_infifpo.reference import FUSIONS
from megatron_infifpo.training.objective import pair_losses, references

PREFERENCE = [name for name in METHODS if resolve(name).responses in (2, 3)]


@st.composite
def rows(draw, responses: int = 2):
    """A row in float64 without the model: B pairs, M sources, one-token responses among them."""
    pairs, sources = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def counts(*shape):
        return torch.randint(1, 9, shape, generator=generator)

    def sums(tokens):
        values = torch.rand(tokens.shape, generator=generator, dtype=torch.float64)
        return -draw(st.sampled_from([1e-3, 1.0, 20.0])) * values * tokens

    own, theirs = counts(pairs, responses), counts(pairs, responses, sources)
    return {
        "token_counts": own,
        "initial_sum_logps": sums(own),
        "source_sum_logps": sums(theirs),
        "source_token_counts": theirs,
        "source_mask": torch.rand(pairs, sources, generator=generator) < 0.8,
        "source_weights": torch.rand(pairs, sources + 1, generator=generator),
    }


def coefficients(method, row, policy, **options):
    """Losses and their gradients with respect to the compared log-probs, `[B, R]`."""
    sums = policy.clone().requires_grad_()
    losses, logps, reference = pair_losses(method, row, sums, **options)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    return losses, grad, reference


@settings(deadline=None, max_examples=100)
@given(rows(), st.sampled_from(list(FUSIONS)), st.booleans(), st.booleans())
def test_first_loss_of_infifpo(row, fusion, normalized, also_initial):
    """With clipping the reference is never on the near side of the policy."""
    method = resolve(
        "infifpo", fusion=fusion, length_normalization=normalized, initial_as_source=also_initial
    )
    losses, _, _ = coefficients(method, row, row["initial_sum_logps"])
    assert (losses >= math.log(2) - 1e-9).all()
    squared = resolve("infifpo-ipo", fusion=fusion)
    losses, _, _ = coefficients(squared, row, row["initial_sum_logps"])
    assert (losses >= (1 / (2 * squared.beta)) ** 2 - 1e-9).all()


@settings(deadline=None, max_examples=50)
@given(rows(responses=3), st.floats(0, 1))
def test_first_loss_of_wrpo(row, progress):
    for name in ("wrpo", "infifpo-wrpo"):
        losses, _, _ = coefficients(resolve(name), row, row["initial_sum_logps"], progress=progress)
        if name == "wrpo":
            torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
        else:
            assert (losses >= math.log(2) - 1e-9).all()


@settings(deadline=None, max_examples=200)
@given(rows(), st.sampled_from(list(FUSIONS)), st.integers(0, 2**32))
def test_gradient_analysis_of_infifpo(row, fusion, seed):
    """The paper's gradient: beta sigmoid(-beta d), for the rejected response and minus the chosen.

    Chosen goes up and rejected down, by the same amount, which is the larger the more the fused
    source prefers the chosen response; with clipping that is at least as large as DPO's.
    """
    noise = torch.rand(
        row["token_counts"].shape,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    policy = row["initial_sum_logps"] - noise * row["token_counts"]
    method = resolve("infifpo", fusion=fusion)
    _, grad, reference = coefficients(method, row, policy)
    assert (grad[:, CHOSEN] <= 0).all() and torch.equal(grad[:, CHOSEN], -grad[:, REJECTED])
    gaps = [
        values[:, CHOSEN] - values[:, REJECTED]
        for values in (policy / row["token_counts"], reference.logps)
    ]
    expected = method.beta * torch.sigmoid(method.beta * (gaps[1] - gaps[0]))
    torch.testing.assert_close(grad[:, REJECTED], expected)
    plain = resolve("dpo", length_normalization=True)
    _, dpo_grad, _ = coefficients(plain, row, policy)
    assert (grad[:, REJECTED] >= dpo_grad[:, REJECTED] - 1e-12).all()
    # A more decided source, all else equal, never weakens the pair.
    decided = {**row, "source_sum_logps": row["source_sum_logps"].clone()}
    decided["source_sum_logps"][:, CHOSEN] *= 0.5
    decided["source_sum_logps"][:, REJECTED] *= 2.0
    if fusion == "average":
        _, stronger, _ = coefficients(method, decided, policy)
        assert (stronger[:, REJECTED] >= grad[:, REJECTED] - 1e-12).all()


@settings(deadline=None, max_examples=50)
@given(rows(responses=3), st.floats(0.01, 0.99))
def test_wrpo_pushes_both_preferred_responses(row, progress):
    method = resolve("infifpo-wrpo", alpha=0.5)
    _, grad, _ = coefficients(method, row, row["initial_sum_logps"], progress=progress)
    alpha = 0.5 * progress
    torch.testing.assert_close(grad[:, CHOSEN], -alpha * grad[:, REJECTED])
    torch.testing.assert_close(grad[:, PIVOT_CHOSEN], -(1 - alpha) * grad[:, REJECTED])
    assert (grad[:, REJECTED] > 0).all()


@settings(deadline=None, max_examples=50)
@given(rows())
def test_pivot_as_its_own_source_is_dpo(row):
    row["source_sum_logps"] = row["initial_sum_logps"].unsqueeze(-1)
    row["source_token_counts"] = row["token_counts"].unsqueeze(-1)
    row["source_mask"] = row["source_mask"][:, :1]
    policy = row["initial_sum_logps"] * 1.1
    for fused, plain in (("infifpo", "dpo"), ("infifpo-ipo", "ipo")):
        method = resolve(plain, length_normalization=True)
        a, _, _ = coefficients(resolve(fused), row, policy)
        b, _, _ = coefficients(method, row, policy)
        torch.testing.assert_close(a, b)


@settings(deadline=None, max_examples=30)
@given(rows(responses=3), st.sampled_from(PREFERENCE))
def test_sft_term_is_the_mean_over_the_chosen_tokens(row, name):
    policy = row["initial_sum_logps"] * 1.3
    plain, _, _ = pair_losses(resolve(name), row, policy)
    more, _, _ = pair_losses(resolve(name, sft_weight=0.7), row, policy)
    expected = -0.7 * policy[:, CHOSEN] / row["token_counts"][:, CHOSEN]
    torch.testing.assert_close(more - plain, expected)


@settings(deadline=None, max_examples=50)
@given(rows())
def test_initial_pivot_as_a_source(row):
    """Unclipped average over M sources and the initial pivot, that is over M + 1 values."""
    method = resolve("infifpo", fusion="average", clip=False, initial_as_source=True)
    reference = references(method, row, row["initial_sum_logps"])
    own = row["initial_sum_logps"] / row["token_counts"]
    means = row["source_sum_logps"] / row["source_token_counts"]
    mask = row["source_mask"][:, None, :]
    expected = (own + (means * mask).sum(-1)) / (1 + mask.sum(-1))
    torch.testing.assert_close(reference.logps, expected)
    assert reference.weights.shape[-1] == means.shape[-1] + 1


# One pair: means of the initial pivot -1 and -2; three sources of two tokens each.
FIXED = {
    "token_counts": torch.tensor([[2, 2]]),
    "initial_sum_logps": torch.tensor([[-2.0, -4.0]], dtype=torch.float64),
    "source_sum_logps": torch.tensor(
        [[[-1.0, -1.4, -8.0], [-4.2, -5.0, -3.0]]], dtype=torch.float64
    ),
    "source_token_counts": torch.full((1, 2, 3), 2),
    "source_mask": torch.ones(1, 3, dtype=torch.bool),
}
POLICY = torch.tensor([[-1.2, -4.6]], dtype=torch.float64)  # means -0.6, -2.3


@pytest.mark.parametrize(
    "options, expected",
    [
        # Clipped means: chosen -0.5, -0.7, -1; rejected -2.1, -2.5, -2. To the policy's
        # probabilities: 0.06, 0.05, 0.18; 0.022, 0.018, 0.035.
        ({}, (-1.0, -2.0)),
        # Unclipped: chosen -0.5, -0.7, -4 (0.53 away); rejected -2.1, -2.5, -1.5 (0.12 away).
        ({"clip": False}, (-4.0, -1.5)),
        # Sums, clipped: chosen -1, -1.4, -2 to -1.2; rejected -4.2, -5, -4 to -4.6.
        ({"length_normalization": False}, (-2.0, -4.0)),
        # From the initial pivot, -1 and -2.
        ({"margin_anchor": "initial"}, (-0.5, -2.5)),
        # One source for both, by the sum of its margins: 0.08, 0.07, 0.22.
        ({"selection": "pair"}, (-1.0, -2.0)),
        # 0.24 + 0.013, 0.13 + 0.053, 0.
        ({"selection": "pair", "margin_anchor": "initial"}, (-0.5, -2.1)),
        ({"fusion": "average"}, (-2.2 / 3, -6.6 / 3)),
        ({"fusion": "confidence"}, (-3 / (2 + 1 / 0.7 + 1), -3 / (1 / 2.1 + 1 / 2.5 + 0.5))),
        ({"fusion": "average", "initial_as_source": True}, (-3.2 / 4, -8.6 / 4)),
    ],
)
def test_every_option_reaches_the_reference(options, expected):
    method = resolve("infifpo", **options)
    policy = POLICY / 2 if method.length_normalization else POLICY
    reference = references(method, FIXED, policy)
    assert reference.logps[0].tolist() == pytest.approx(expected, abs=1e-9)


def test_margins_of_log_probs():
    """Of -0.1 and -2.5 the second is farther from -1 in log-probs, the first in probability."""
    row = FIXED | {
        "source_sum_logps": torch.tensor([[[-0.2, -5.0]] * 2], dtype=torch.float64),
        "source_token_counts": torch.full((1, 2, 2), 2),
        "source_mask": torch.ones(1, 2, dtype=torch.bool),
    }
    for space, expected in (("prob", -0.1), ("log-prob", -2.5)):
        method = resolve("infifpo", clip=False, margin_space=space)
        reference = references(method, row, torch.tensor([[-1.0, -1.0]], dtype=torch.float64))
        assert reference.logps[0].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(
    "options, expected",
    [
        # d = (-0.6 + 1) - (-2.3 + 2) = 0.7
        ({}, math.log(1 + math.exp(-1.75))),
        ({"beta": 1.0}, math.log(1 + math.exp(-0.7))),
        ({"objective": "ipo"}, (0.7 - 5) ** 2),
        ({"objective": "hinge", "beta": 1.0}, 0.3),
        (
            {"label_smoothing": 0.1},
            0.9 * math.log(1 + math.exp(-1.75)) + 0.1 * math.log(1 + math.exp(1.75)),
        ),
        ({"sft_weight": 2.0}, math.log(1 + math.exp(-1.75)) + 1.2),
        (
            {"objective": "discopop", "discopop_tau": 0.5, "beta": 1.0},
            math.log(1 + math.exp(-0.7)) / (1 + math.exp(1.4))
            + math.exp(-0.7) / (1 + math.exp(-1.4)),
        ),
        # Sums: d = (-1.2 + 2) - (-4.6 + 4) = 1.4, beta 0.1.
        ({"reference": "initial", "length_normalization": False}, math.log(1 + math.exp(-0.14))),
    ],
)
def test_every_option_reaches_the_loss(options, expected):
    losses, _, _ = pair_losses(resolve("infifpo", **options), FIXED, POLICY)
    assert losses.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", PREFERENCE)
def test_masked_sources_may_hold_anything(name):
    row = {
        "token_counts": torch.tensor([[1, 1, 1], [2, 1, 3]]),
        "initial_sum_logps": torch.tensor([[-1.0, -2.0, -3.0], [0.0, -1e4, -1.0]]),
        "source_sum_logps": torch.full((2, 3, 2), torch.nan),
        "source_token_counts": torch.ones(2, 3, 2),
        "source_mask": torch.zeros(2, 2, dtype=torch.bool),
    }
    losses, grad, _ = coefficients(resolve(name), row, row["initial_sum_logps"] - 0.5)
    assert torch.isfinite(losses).all() and torch.isfinite(grad).all()
