"""How a step's pairs lie on data-parallel ranks and in their rows."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.errors import UserError
from megatron_infifpo.rows.plan import (
    Rows,
    fitting_micro_batch_size,
    lay_out,
    plan_evaluation,
    plan_step,
)

# Machines with few cores miss deadlines; nothing is kept between runs.
CALM = settings(deadline=None, database=None)
LENGTHS = st.lists(st.integers(2, 5000), min_size=1, max_size=60).map(np.array)


def flat(plan: list[Rows]) -> list[int]:
    return [sample for share in plan for row in share for sample in row]


def tokens_of(plan: list[Rows], lengths: np.ndarray) -> list[list[int]]:
    """Tokens of each row of each rank."""
    return [[int(lengths[row].sum()) for row in share] for share in plan]


def laid_out(lengths: list[int], ranks: int, rows: int) -> list[Rows]:
    """Lengths of the pairs of each row of each rank, where these are the pairs of the step."""
    plan = lay_out(np.arange(len(lengths)), np.array(lengths), ranks, rows)
    return [[[lengths[sample] for sample in row] for row in share] for share in plan]


@pytest.mark.parametrize(
    "lengths, rows, expected",
    [
        # 20 tokens, 10 a rank. Rows of all ranks at once would be 9, 4, 4 and 3: 12 on some rank.
        ([9, 4, 3, 2, 1, 1], 2, [[[9], [1]], [[4, 1], [3, 2]]]),
        # 36 tokens, 18 a rank, 9 a row.
        ([8, 7, 6, 5, 4, 3, 2, 1], 2, [[[8, 1], [5, 4]], [[7, 2], [6, 3]]]),
        # As many pairs as rows: 9 has to have another one with it, at best the shortest.
        ([9, 4, 3, 2], 2, [[[9], [2]], [[4], [3]]]),
        # A row a rank, and none that has to have another: 9 is alone.
        ([9, 4, 3, 2], 1, [[[9]], [[4, 3, 2]]]),
        # Of equal pairs, ranks and rows the first comes first.
        ([1, 1, 1, 1, 1], 2, [[[1, 1], [1]], [[1], [1]]]),
    ],
)
def test_two_ranks_by_hand(lengths, rows, expected):
    assert laid_out(lengths, 2, rows) == expected


def test_equal_things_are_taken_in_order():
    plan = lay_out(np.array([7, 3, 5, 1, 6]), np.full(8, 4), 2, 2)
    assert plan == [[[7, 6], [5]], [[3], [1]]]


def test_a_rank_with_a_long_text_has_few_others():
    """Three, one for each row that it has beside; the other ranks have 20 each."""
    lengths = [131_072, *[1_000] * 63]
    alone, *others = laid_out(lengths, 4, 4)
    assert alone == [[131_072], [1_000], [1_000], [1_000]]
    assert others == [[[1_000] * 5] * 4] * 3
    # They are the shortest, since the longer ones have gone elsewhere by then.
    alone, *others = laid_out([131_072, *range(1_063, 1_000, -1)], 4, 4)
    assert sorted(map(sum, alone)) == [1_001, 1_002, 1_003, 131_072]
    # 60 pairs, 1,004 to 1,063: of three equal sums none is more than the longest from another.
    sums = [sum(map(sum, share)) for share in others]
    assert sum(sums) == 60 * 2_067 // 2 and max(sums) - min(sums) <= 20


def test_two_long_texts_are_on_two_ranks():
    found = laid_out([131_072, 131_072, *[1_000] * 14], 2, 4)
    assert found == [[[131_072], [1_000] * 3, [1_000] * 2, [1_000] * 2]] * 2


@CALM
@given(LENGTHS, st.integers(0, 2**32), st.integers(0, 50), st.integers(1, 40), st.data())
def test_a_step_has_exactly_its_pairs_at_any_layout(lengths, seed, step, batch, data):
    ranks = data.draw(st.integers(1, batch))
    rows = data.draw(st.integers(1, batch // ranks))

    def planned(ranks, rows):
        shape = {"data_parallel_size": ranks, "num_microbatches": rows}
        return plan_step(lengths, seed=seed, step=step, global_batch_size=batch, **shape)

    plan = planned(ranks, rows)
    assert plan == planned(ranks, rows)
    assert len(plan) == ranks and all(len(share) == rows and all(share) for share in plan)
    # No pair comes more often than the epochs that the step touches.
    epochs = (step * batch + batch - 1) // len(lengths) - step * batch // len(lengths) + 1
    assert max(collections.Counter(flat(plan)).values()) <= epochs
    assert sorted(flat(plan)) == sorted(flat(planned(1, 1)))
    # Longest first gives at most one pair of imbalance: between rows of a rank ...
    loads = tokens_of(plan, lengths)
    for share, tokens in zip(plan, loads, strict=True):
        assert tokens == sorted(tokens, reverse=True)
        assert tokens[0] - tokens[-1] <= lengths[flat([share])].max()
    # ... and between ranks, unless one has no more pairs than it must have.
    sums = [sum(tokens) for tokens in loads]
    assert sums == sorted(sums, reverse=True)
    if rows == 1 or min(len(flat([share])) for share in plan) > rows:
        assert sums[0] - sums[-1] <= lengths[flat(plan)].max()


def test_ranks_have_equal_work():
    """Four rows of four pairs on each of eight ranks, with one text as long as five or ten others.

    Its rank, with three more rows as long as the others', would have a third more than the mean.
    """
    lengths = np.random.Generator(np.random.Philox(0)).integers(100, 4000, 128)
    lengths[77] = 20_000
    shape = {"global_batch_size": 128, "data_parallel_size": 8, "num_microbatches": 4}
    sums = np.sum(tokens_of(plan_step(lengths, seed=0, step=0, **shape), lengths), axis=1)
    assert sums.max() / sums.mean() < 1.005


def test_steps_of_evaluation_lie_so_too():
    lengths = np.array([1, 9, 2, 1, 4, 3, 9, 9])
    shape = {"steps": 2, "data_parallel_size": 2, "num_microbatches": 1}
    assert plan_evaluation(lengths, step=0, **shape) == [[[1]], [[2, 0, 3]]]
    assert plan_evaluation(lengths, step=1, **shape) == [[[6, 4]], [[7, 5]]]


def test_a_token_budget_holds_in_every_step():
    lengths = np.random.default_rng(0).integers(100, 4000, 700)
    run = {"seed": 3, "global_batch_size": 64, "data_parallel_size": 4}
    sizes = {}
    for budget in (4_000, 9_000, 30_000, 10**6):
        size = fitting_micro_batch_size(lengths, budget, steps=12, **run)
        sizes[budget] = size
        for fits, candidate in ((True, size), (False, 2 * size)):
            if 64 % (4 * candidate):
                continue
            rows = 16 // candidate
            plans = [plan_step(lengths, step=s, num_microbatches=rows, **run) for s in range(12)]
            loads = itertools.chain(*(tokens_of(plan, lengths) for plan in plans))
            assert (max(map(max, loads)) <= budget) == fits, (budget, candidate)
    assert sizes[4_000] == 1 and sizes[10**6] == 16
    assert list(sizes.values()) == sorted(sizes.values())
    with pytest.raises(UserError, match="longest pair has 39"):
        fitting_micro_batch_size(lengths, 3_000, steps=12, **run)


@pytest.mark.parametrize(
    "lengths, longest",
    [
        # Four rows on one rank: 8, 8, 7, 6. On two: 8 and 7 on one, 9 and 5 on the other.
        ([8, 5, 5, 4, 4, 1, 1, 1], {1: 8, 2: 9}),
        # 9, 7, 7, 7 on one rank; 8 and 7, 8 and 7 on two.
        ([7, 5, 5, 4, 3, 2, 2, 2], {1: 9, 2: 8}),
    ],
)
def test_a_token_budget_is_of_the_ranks_own_rows(lengths, longest):
    """Rows of two pairs on the average, no more of them than a budget has tokens."""
    run = {"seed": 0, "steps": 1, "global_batch_size": 8}
    for ranks, most in longest.items():
        sizes = [
            fitting_micro_batch_size(np.array(lengths), budget, data_parallel_size=ranks, **run)
            for budget in (most - 1, most)
            if budget >= lengths[0]
        ]
        assert sizes == [1, 2][-len(sizes) :], ranks
