"""Optima and first steps, found with the program's own losses, are those on paper."""

import math

import pytest
import torch

from megatron_infifpo.methods import resolve
from megatron_infifpo.study.tabular import Table, optimum, settled, two_answers
from megatron_infifpo.study.theory import (
    BETA,
    VARIANTS,
    answers,
    first_pushes,
    fixed_points,
    log_odds,
    logit,
    margins_by_sources,
    moving_anchor,
    sigmoid,
)

CLOSE = 1e-9
# The mean of the highest of n draws from the standard normal distribution, n = 2 to 6.
HIGHEST = (0.56419, 0.84628, 1.02938, 1.16296, 1.26721)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labelled(initial, sources, rewards):
    """All pairs of K answers, labelled by Bradley and Terry's rule on `rewards`, `[P, K]`."""
    wins = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    wins = wins * (1 - torch.eye(rewards.shape[1]))
    return Table(initial, sources, wins / wins.sum(dim=(1, 2), keepdim=True))


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, atol=CLOSE, rtol=0)


def odds(logps):
    return logps[:, 0] - logps[:, 1]


@pytest.fixture(scope="module")
def points():
    return fixed_points()


def test_every_optimum_is_the_one_on_paper(points):
    assert len(points) == 24 and points[0].keys() >= VARIANTS.keys()
    assert max(row["deviation"] for row in points) < CLOSE


def test_the_closed_form_of_clipping():
    for q in (0.1, 0.4, 0.5, 0.6, 0.95):
        for upper, lower in ((1.0, 1.0), (2.0, -1.0), (40.0, -60.0)):
            theta = log_odds(upper, lower, q)
            up = q * sigmoid(BETA * (upper - theta))
            assert up == pytest.approx((1 - q) * sigmoid(BETA * (theta - lower)), abs=1e-12)
    assert log_odds(3.0, 3.0, 0.8) == pytest.approx(3 + logit(0.8) / BETA)
    assert log_odds(3.0, -1.0, 0.5) == pytest.approx(1.0)  # half way
    # Far apart the majority takes its side whole, whatever the other side says.
    assert log_odds(3.0, -100.0, 0.75) == pytest.approx(3 + math.log(0.5 / 0.25) / BETA)
    assert log_odds(100.0, -3.0, 0.25) == pytest.approx(-3 - math.log(0.5 / 0.25) / BETA)


def test_where_labels_are_inverted_clipping_keeps_the_source_out(points):
    """The source is right, three of four labels are not; what follows from the table."""
    case = {"source": 2.0, "level": 0.0, "initial": -1.0, "q": 0.25}
    row = next(row for row in points if case.items() <= row.items())
    dpo, clipped, unclipped = row["dpo"], row["clipped"], row["unclipped"]
    assert dpo < clipped < logit(0.25) / BETA < unclipped < row["weighted"]
    assert clipped - dpo < (unclipped - dpo) / 4


def test_a_level_is_taken_for_a_preference_unless_sources_are_centred_or_clipped_by_pair(points):
    for row in points:
        assert row["centred"] == pytest.approx(row["by pair"], abs=CLOSE)
        if row["source"] == 0:  # it says nothing, and finds both answers less likely by 2
            assert row["level"] == -2 and row["weighted"] == pytest.approx(row["dpo"], abs=CLOSE)
            side = math.copysign(1, row["q"] - 0.5)
            if row["q"] != 0.5:
                assert side * (row["clipped"] - row["centred"]) > 0.9
        else:
            assert row["clipped"] == pytest.approx(row["by pair"], abs=CLOSE)


@pytest.mark.parametrize("fusion", ["average", "confidence", "max-margin"])
def test_of_any_number_of_answers_it_is_the_fused_model_times_exp_of_the_rewards(fusion):
    """pi* = M exp(r / beta) / Z, whatever the initial pivot is and wherever descent starts."""
    sources = (2 * random(3, 4, 2, seed=1)).log_softmax(dim=1)
    rewards, initial = random(3, 4, seed=2), random(3, 4, seed=3).log_softmax(dim=1)
    fused = sources.mean(dim=-1)
    if fusion == "confidence":
        shares = 1 / -sources
        fused = (shares * sources).sum(dim=-1) / shares.sum(dim=-1)
    if fusion == "max-margin":
        away = (sources.exp() - initial.exp()[..., None]).abs()
        fused = torch.where(away[..., 0] >= away[..., 1], sources[..., 0], sources[..., 1])
    options = {"margin_anchor": "initial"} if fusion == "max-margin" else {}
    method = resolve("fpo", beta=1.5, fusion=fusion, **options)
    expected = (fused + rewards / 1.5).log_softmax(dim=1)
    table = labelled(initial, sources, rewards)
    assert_close(optimum(method, table), expected)
    assert_close(optimum(method, table, start=random(3, 4, seed=4)), expected)
    if fusion != "max-margin":
        other = labelled(random(3, 4, seed=5).log_softmax(dim=1), sources, rewards)
        assert_close(optimum(method, other), expected)


def test_a_weighted_pair_is_a_vote_beside_the_labels():
    """pi* = initial source^(c / beta) exp(r / beta) / Z, by verdicts of one source."""
    source = (2 * random(3, 4, 1, seed=1)).log_softmax(dim=1)
    rewards, initial = random(3, 4, seed=2), random(3, 4, seed=3).log_softmax(dim=1)
    method = resolve("dpo", beta=1.5, pair_weights="agreement", verdict_scale=0.6)
    expected = (initial + (0.6 * source[..., 0] + rewards) / 1.5).log_softmax(dim=1)
    assert_close(optimum(method, labelled(initial, source, rewards)), expected)


def test_several_verdicts_and_a_cut():
    q, sources = 0.7, (1.0, -0.4, 2.0)
    table = two_answers([answers(-1.0)], [[answers(s) for s in sources]], [q])

    def found(**options):
        return float(settled(resolve("dpo", beta=BETA, pair_weights="agreement", **options), table))

    mean = sum(map(sigmoid, sources)) / 3
    assert found() == pytest.approx(-1 + (logit(q) + logit(mean)) / BETA, abs=CLOSE)
    # Both labels are above the cut, so both count alike: DPO; one is, and there is no bound.
    assert min(mean, 1 - mean) > 0.2 and max(mean, 1 - mean) > 0.6
    assert found(verdict_cut=0.2) == pytest.approx(-1 + logit(q) / BETA, abs=CLOSE)
    assert found(verdict_cut=0.6) == pytest.approx(50)
    wrong = two_answers([answers(-1.0)], [[answers(-s) for s in sources]], [q])
    cut = resolve("dpo", beta=BETA, pair_weights="agreement", verdict_cut=0.6)
    assert float(settled(cut, wrong)) == pytest.approx(-50)


def test_of_several_centred_sources_the_extremes_count():
    others, initial, q = [(1.5, -2.0), (0.4, 1.0), (-3.0, -0.5)], (0.2, 0.0), (0.7, 0.4)
    said = [[answers(*one) for one in others]] * 2
    method = resolve("infifpo", beta=BETA, source_values="centred", margin_anchor="initial")
    found = settled(method, two_answers([answers(*initial)] * 2, said, q))
    assert found.tolist() == pytest.approx([log_odds(1.5, -3.0, x) for x in q], abs=CLOSE)


def test_descent_and_bisection_agree():
    table = two_answers(
        [answers(x) for x in (-1.0, 0.5)],
        [[answers(x, 0.3), answers(2 * x, -1.0)] for x in (0.7, -2.0)],
        [0.8, 0.35],
    )
    for method in VARIANTS.values():
        assert_close(odds(optimum(method, table)), settled(method, table))


def test_no_further_source_lowers_a_clipped_max_margin():
    rows = margins_by_sources()
    for row, expected in zip(rows, HIGHEST, strict=True):
        assert row["max-margin fell"] == 0
        # Six standard errors of the mean of 4,000, whose deviation is below 1.2.
        assert row["max-margin"] == pytest.approx(2 * expected, abs=6 * 1.2 / 4000**0.5)
        assert abs(row["unclipped"]) < 0.15
        for fusion in ("average", "confidence"):  # these stay where one source brings them
            assert row[fusion] == pytest.approx(2 * HIGHEST[0], abs=0.1)
            assert (row[f"{fusion} fell"] > 0.4) == (row["sources"] > 1)


def test_first_pushes():
    for row in first_pushes():
        assert row["deviation"] < 1e-12
        assert 0.5 <= row["clipped wrong"] <= row["clipped right"] < 1
        # What clipping leaves of a source's doubts: at most half of a pair's push.
        assert row["clipped wrong"] >= row["clipped right"] / 2
        assert row["unclipped wrong"] == pytest.approx(1 - row["unclipped right"])


def test_the_policy_settles_between_sources_when_the_anchor_moves():
    rows = moving_anchor()
    assert max(row["deviation"] for row in rows) < CLOSE
    # Before midway, there, and past it, where the stronger source has no part in it.
    places = [("stronger", "midway", "weaker").index(_at(row)) for row in rows]
    assert places == [0, 1, 2, 2]


def _at(row):
    return min(("weaker", "midway", "stronger"), key=lambda name: abs(row[name] - row["found"]))


def test_tables_are_the_same_every_time(points):
    assert fixed_points() == points and margins_by_sources() == margins_by_sources()
