"""Weights of pairs: closed forms, what they do to a gradient, bad arguments."""

import math
from typing import Any

import pytest
import torch

from megatron_infifpo.pair_weights import PAIR_WEIGHTS, pair_weights

# B 3, R 2, M 2: margins of 1 and -2, 0.5 and 3, 0 and 1.
LOGPS = torch.tensor(
    [[[-1.0, -4.0], [-2.0, -2.0]], [[-1.0, -1.0], [-1.5, -4.0]], [[-2.0, -2.0], [-2.0, -3.0]]],
    dtype=torch.float64,
)
MASK = torch.tensor([[True, True], [True, False], [False, False]])
KNOWN = torch.tensor([[0.7, 0.9], [0.7, 0.9], [0.7, 0.9]], dtype=torch.float64)


def verdict(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))


def test_agreement_is_the_mean_of_those_that_take_part():
    found = pair_weights("agreement", LOGPS, scale=1.5, source_mask=MASK)
    expected = [(verdict(1.5) + verdict(-3)) / 2, verdict(0.75), 1.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-15)
    everywhere = pair_weights("agreement", LOGPS, scale=1.0)
    assert everywhere[2].item() == pytest.approx((0.5 + verdict(1)) / 2)


def test_the_best_source_is_the_most_accurate_one_that_takes_part():
    found = pair_weights("best-source", LOGPS, scale=1.0, source_mask=MASK, accuracy=KNOWN)
    assert found.tolist() == pytest.approx([verdict(-2), verdict(0.5), 1.0])
    tied = pair_weights("best-source", LOGPS, scale=1.0, accuracy=torch.tensor([0.8, 0.8]))
    assert tied.tolist() == pytest.approx([verdict(1), verdict(0.5), 0.5]), "the first one wins"
    nothing = torch.full((2,), math.nan)
    assert pair_weights("best-source", LOGPS, scale=1.0, accuracy=nothing).tolist() == [1.0] * 3
    one = torch.tensor([0.0, math.nan])
    found = pair_weights("best-source", LOGPS, scale=1.0, accuracy=one)
    assert found.tolist() == pytest.approx([verdict(1), verdict(0.5), 0.5]), "0 is known, NaN not"


def test_a_sum_is_the_probability_of_having_given_the_chosen_one():
    """Of a source that gave one of two answers, with the probabilities that it gives them."""
    chosen, rejected = 0.03, 0.01
    logps = torch.tensor([[[chosen], [rejected]]]).log()
    found = pair_weights("agreement", logps, scale=1.0)
    assert found.item() == pytest.approx(chosen / (chosen + rejected))


def test_cutting():
    found = pair_weights("agreement", LOGPS, scale=1.0, source_mask=MASK, cut=0.5)
    assert found.tolist() == [0.0, 1.0, 1.0]
    exact = pair_weights("agreement", torch.zeros(1, 2, 1), scale=1.0, cut=0.5)
    assert exact.tolist() == [1.0], "a weight of the cut itself is kept"


@pytest.mark.parametrize("kind", PAIR_WEIGHTS)
def test_a_masked_source_may_hold_anything(kind):
    read: Any = {"accuracy": KNOWN} if kind == "best-source" else {}
    expected = pair_weights(kind, LOGPS, scale=2.0, source_mask=MASK, **read)
    garbage = torch.where(MASK[:, None], LOGPS, math.nan)
    found = pair_weights(kind, garbage, scale=2.0, source_mask=MASK, **read)
    assert torch.equal(found, expected)
    extreme = pair_weights(kind, LOGPS * 1e6, scale=25.0, source_mask=MASK, **read)
    assert torch.isfinite(extreme).all()


@pytest.mark.parametrize(
    "kind, options, message",
    [
        ("best", {}, "kind is 'best', expected one of agreement, best-source"),
        ("agreement", {"scale": 0.0}, r"scale is 0.0, expected a number in \(0, inf\)"),
        ("agreement", {"cut": 1.0}, r"cut is 1.0, expected a number in \(0, 1\)"),
        ("agreement", {"accuracy": KNOWN}, "accuracy has no effect for .* 'agreement'"),
        ("best-source", {}, "accuracy is needed for the pair weights 'best-source'"),
        ("agreement", {"source_logps": LOGPS[:, :1]}, r"is \[3, 1, 2\], expected .* at least 2"),
    ],
)
def test_bad_arguments(kind, options, message):
    with pytest.raises(ValueError, match=message):
        pair_weights(kind, **({"source_logps": LOGPS, "scale": 1.0} | options))
