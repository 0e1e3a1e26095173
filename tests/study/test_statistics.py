"""Intervals, corrections, power, AUC, slope: against tables, other programs and plain loops."""

import math
import random

import numpy as np
import pytest

from megatron_infifpo.study.statistics import (
    auc,
    detectable,
    holm,
    over_sets,
    paired,
    pooled_sd,
    power,
    seeds_needed,
    slope,
    t_interval,
    t_quantile,
    two_sided_p,
)

# Upper 2.5 % and 0.5 % points of Student's t, as printed in any table.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 5: (2.571, 4.032), 11: (2.201, 3.106)}


@pytest.mark.parametrize("freedom", TABLE)
def test_quantiles_are_the_tables(freedom):
    found = (t_quantile(0.975, freedom), t_quantile(0.995, freedom))
    assert found == pytest.approx(TABLE[freedom], abs=5e-4)
    assert two_sided_p(found[0], freedom) == pytest.approx(0.05, rel=1e-12)


def test_students_distribution_in_closed_form():
    """Of 1, 2 and 4 degrees of freedom; of many it is nearly the normal one."""
    for t in (0.0, 0.3, -2.2, 9.0, 60.0):
        x = abs(t)
        root = math.sqrt(4 + x * x)
        assert two_sided_p(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(x), rel=1e-9)
        assert two_sided_p(t, 2) == pytest.approx(1 - x / math.sqrt(2 + x * x), rel=1e-9)
        four = x / root * (1 + 2 / root**2)
        assert two_sided_p(t, 4) == pytest.approx(1 - four, rel=1e-9, abs=1e-14)
    assert two_sided_p(1.959964, 10**7) == pytest.approx(0.05, rel=1e-5)


def test_interval_by_hand():
    """1 to 5: the standard error is sqrt(2.5 / 5), the quantile of 4 degrees 2.776."""
    found = t_interval([5, 3, 1, 2, 4])
    assert found is not None
    assert (found.mean, found.n, found.sd) == (3, 5, math.sqrt(2.5))
    assert found.half == pytest.approx(2.7764451 * math.sqrt(0.5), rel=1e-7)
    assert (found.low, found.high) == (3 - found.half, 3 + found.half)
    assert found.p == pytest.approx(0.0132356, rel=1e-4)  # t = 4.2426


def test_interval_without_spread():
    assert t_interval([]) is None and t_interval([0.3]) is None
    nothing, something = t_interval([0.0, 0.0]), t_interval([0.5, 0.5, 0.5])
    assert nothing is not None and something is not None
    assert (nothing.mean, nothing.half, nothing.p) == (0, 0, 1)
    assert (something.mean, something.half, something.p) == (0.5, 0, 0)


def test_interval_does_not_know_the_order():
    rng = random.Random(0)
    values = [rng.gauss(0.5, 0.01) for _ in range(30)]
    first = t_interval(values)
    for _ in range(20):
        rng.shuffle(values)
        assert t_interval(values) == first


def test_pairs_are_the_common_ones():
    a = {(1, 0): 0.5, (0, 0): 0.25, (0, 1): 0.75, (0, 2): 1.0}
    b = {(0, 1): 0.5, (0, 0): 0.5, (1, 0): 0.25, (2, 0): 0.0}
    assert paired(a, b) == {(0, 0): -0.25, (0, 1): 0.25, (1, 0): 0.25}
    assert [*paired(a, b)] == [(0, 0), (0, 1), (1, 0)]


def test_over_sets_is_of_their_means():
    values = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 4.0, (2, 7): 6.0}
    assert over_sets(values) == t_interval([2.0, 4.0, 6.0])
    assert over_sets({pair: v for pair, v in values.items() if pair[0] < 2}) is None


def test_only_sets_cover_other_sources():
    """Where sets differ, seeds alone claim too much of new sources, and sets what they say."""
    rng = random.Random(1)
    covered = {"seeds": 0, "sets": 0}
    for _ in range(400):
        effects = [rng.gauss(0, 1) for _ in range(3)]
        values = {(s, n): effects[s] + rng.gauss(0, 1) for s in range(3) for n in range(4)}
        for name, found in (("seeds", t_interval(values.values())), ("sets", over_sets(values))):
            assert found is not None
            covered[name] += found.low <= 0 <= found.high
    assert covered["seeds"] / 400 < 0.8
    assert covered["sets"] / 400 == pytest.approx(0.95, abs=0.03)


def test_pooled_sd():
    groups = [[1.0, 3.0], [10.0, 10.0, 13.0], [5.0], []]
    squares = sum(((np.array(g) - np.mean(g)) ** 2).sum() for g in groups if g)
    assert pooled_sd(groups) == (pytest.approx(math.sqrt(squares / 3)), 3)
    assert pooled_sd([[5.0], []]) is None


def test_holm_by_hand():
    """4 x .005, 3 x .01, 2 x .03, 1 x .04, the last raised to the one before it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == [0.04, 0.04]


def test_holm_counts_a_contrast_without_numbers():
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.03), None, pytest.approx(0.08)]


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_of_the_paired_t_test(effect, seeds):
    """What G*Power says for 80 % power, two-sided 5 %."""
    assert seeds_needed(effect, 1.0) == seeds
    assert seeds_needed(3 * effect, 3.0) == seeds
    assert power(effect, 1.0, seeds) >= 0.8 > power(effect, 1.0, seeds - 1)


def test_power_is_how_often_the_test_finds_it():
    rng = np.random.default_rng(4)
    for n, effect, alpha in ((2, 5.0, 0.05), (3, 1.0, 0.05), (6, 1.5, 0.01), (12, 0.0, 0.05)):
        values = rng.normal(effect, 1, (100_000, n))
        t = values.mean(axis=1) / values.std(axis=1, ddof=1) * math.sqrt(n)
        found = (np.abs(t) > t_quantile(1 - alpha / 2, n - 1)).mean()
        assert power(effect, 1.0, n, alpha) == pytest.approx(found, abs=0.006)
    assert power(0.0, 1.0, 12) == pytest.approx(0.05, abs=1e-9)
    assert power(0.5, 1.0, 34) == pytest.approx(0.80778, abs=1e-5)  # of G*Power


def test_detectable_is_what_power_finds():
    for n in (2, 6, 12, 48):
        assert power(detectable(0.02, n), 0.02, n) == pytest.approx(0.8, abs=1e-9)
    assert detectable(1.0, 34) < 0.5 < detectable(1.0, 33)
    assert detectable(1.0, 12, alpha=0.01) > detectable(1.0, 12)
    assert (seeds_needed(0.01, 0.0), detectable(0.0, 3)) == (2, 0.0)


def test_auc_is_a_count_over_pairs():
    rng = random.Random(2)
    for _ in range(50):
        scores = [rng.choice((0.1, 0.2, 0.3, rng.random())) for _ in range(30)]
        labels = [rng.random() < 0.4 for _ in scores]
        wins = [
            1.0 if a > b else 0.5 if a == b else 0.0
            for a, first in zip(scores, labels, strict=True)
            for b, second in zip(scores, labels, strict=True)
            if first and not second
        ]
        expected = sum(wins) / len(wins) if wins else math.nan
        assert auc(scores, labels) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_auc_at_its_ends():
    assert auc([1, 2, 3, 4], [False, False, True, True]) == 1
    assert auc([1, 2, 3, 4], [True, True, False, False]) == 0
    assert auc([7, 7, 7], [True, False, True]) == 0.5
    assert math.isnan(auc([1, 2], [True, True])) and math.isnan(auc([], []))


def test_slope_is_least_squares():
    rng = np.random.default_rng(3)
    x, noise = rng.normal(5, 2, 100), rng.normal(0, 1, 100)
    assert slope(x, 0.7 * x - 3) == pytest.approx(0.7)
    assert slope(x, 0.7 * x - 3 + noise) == pytest.approx(np.polyfit(x, 0.7 * x + noise, 1)[0])
    assert math.isnan(slope([2, 2], [1, 3])) and math.isnan(slope([], []))
