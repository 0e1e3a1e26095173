"""Plans: which pairs a step takes, and which pairs share a row; no tokens are touched.

A row is one micro-batch: whole pairs, packed (see `packing`). Every plan is a pure function of its
arguments, so a run resumes exactly, and a shard has the same rows on any number of ranks.
"""

import functools
import heapq
from collections.abc import Sequence

import numpy as np

from megatron_infifpo.errors import UserError

Rows = list[list[int]]
"""Positions of the samples of each row."""
Sample = tuple[int, int]
"""Tokens of a sample, and its position."""


def spread(samples: Sequence[Sample], parts: int, least: int = 1) -> list[list[Sample]]:
    """Spread samples over so many parts by token count, each onto the one with the fewest tokens.

    Args:
        samples: longest first.
        parts: ranks, or rows.
        least: samples that every part must get; where no more are left than that takes, only the
            parts that lack some take part.

    Returns:
        The samples of each part, the part with the most tokens first.
    """
    lacking = parts * least
    assert len(samples) >= lacking, f"{len(samples)} samples for {parts} parts of {least} or more"
    loads = [(0, part) for part in range(parts)]  # a heap; of equal parts the first is taken
    plan: list[list[Sample]] = [[] for _ in range(parts)]
    for left, sample in zip(range(len(samples), 0, -1), samples, strict=True):
        while left == lacking and len(plan[loads[0][1]]) >= least:
            heapq.heappop(loads)  # it has enough, for good: the others need all that is left
        load, part = loads[0]
        lacking -= len(plan[part]) < least
        plan[part].append(sample)
        heapq.heapreplace(loads, (load + sample[0], part))
    return sorted(plan, key=lambda part: sum(tokens for tokens, _ in part), reverse=True)


def lay_out(
    samples: np.ndarray, lengths: np.ndarray, data_parallel_size: int, num_microbatches: int
) -> list[Rows]:
    """Spread samples over ranks, and then each rank's over its own rows; see `plan_step`.

    A step ends when the slowest rank has done all of its rows: a rank with a long text gets fewer
    short ones. A rank's longest row is its first, so a run that lacks memory fails at once.
    """
    tokens = lengths[samples]
    order = np.argsort(-tokens, kind="stable")
    longest_first = list(zip(tokens[order].tolist(), samples[order].tolist(), strict=True))
    shares = spread(longest_first, data_parallel_size, least=num_microbatches)
    return [
        [[position for _, position in row] for row in spread(share, num_microbatches)]
        for share in shares
    ]


def fill(lengths: np.ndarray, row_tokens: int) -> Rows:
    """Fill as many rows as it takes, of at most `row_tokens` tokens each, longest samples first.

    Args:
        lengths: `[N]` tokens of each sample; those of length 0 are left out.
        row_tokens: tokens of a row; a longer sample gets a row of its own.
    """
    rows: Rows = []
    used = row_tokens + 1
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if length == 0:
            break
        if used + length > row_tokens:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += length
    return rows


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of `count` things in an epoch; not to be written to.

    From Philox's raw numbers: NumPy keeps them the same in every version, unlike `permutation`.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.flags.writeable = False  # it is cached
    return order


def plan_step(
    lengths: np.ndarray,
    *,
    seed: int,
    step: int,
    global_batch_size: int,
    data_parallel_size: int,
    num_microbatches: int,
) -> list[Rows]:
    """Plan one training step.

    The stream of samples is one permutation of all pairs after the other; step `s` takes its
    samples `[s * global_batch_size, (s + 1) * global_batch_size)`, across the end of an epoch too.

    Args:
        lengths: `[N]` tokens of each pair.
        seed: of the permutations, >= 0.
        step: from 0.
        global_batch_size: pairs of a step; may exceed N.
        data_parallel_size: ranks that share the step; which pairs it takes does not depend on it.
        num_microbatches: rows of each rank.

    Returns:
        Positions in `lengths` by rank and row, a rank's longest row first; no row is empty.
    """
    first, count = step * global_batch_size, len(lengths)
    stream = np.arange(first, first + global_batch_size)
    epochs, offsets = stream // count, stream % count
    samples = np.empty(global_batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        taken = epochs == epoch
        samples[taken] = permutation(count, seed, epoch)[offsets[taken]]
    return lay_out(samples, lengths, data_parallel_size, num_microbatches)


def fitting_micro_batch_size(
    lengths: np.ndarray,
    row_tokens: int,
    *,
    seed: int,
    steps: int,
    global_batch_size: int,
    data_parallel_size: int,
) -> int:
    """Return the most pairs a row (on average) with which no row of a run exceeds a token budget.

    Args:
        lengths: `[N]` tokens of each pair.
        row_tokens: the budget.
        seed: of the run.
        steps: of the run.
        global_batch_size, data_parallel_size: of the run.

    Raises:
        UserError: some pair alone exceeds the budget.
    """
    if (longest := int(lengths.max())) > row_tokens:
        raise UserError(
            f"--micro-batch-tokens is {row_tokens}, but the longest pair has {longest} tokens (of "
            "lists: the longest list): raise it, or leave out long responses with a lower "
            "--seq-length, which bounds each one with its prompt; lists are shorter with fewer "
            "responses, too (--list of infifpo label)"
        )
    share = global_batch_size // data_parallel_size
    for size in range(share, 1, -1):
        if share % size:
            continue
        shape = {
            "global_batch_size": global_batch_size,
            "data_parallel_size": data_parallel_size,
            "num_microbatches": share // size,
        }
        plans = (plan_step(lengths, seed=seed, step=s, **shape) for s in range(steps))
        rows = (row for plan in plans for rank in plan for row in rank)
        if all(lengths[row].sum() <= row_tokens for row in rows):
            return size
    return 1


def evaluation_steps(count: int, global_batch_size: int, rows: int) -> int:
    """Return the number of steps that evaluate `count` pairs once each, about a batch a step.

    Steps are as equal as possible, so that none has fewer pairs than rows.

    Raises:
        UserError: fewer pairs than rows.
    """
    if count < rows:
        raise UserError(
            f"validation has {count} pairs for {rows} rows (data-parallel size x micro-batches), "
            "expected at least one pair a row; give more pairs or a smaller --global-batch-size"
        )
    return min(-(-count // global_batch_size), count // rows)


def plan_evaluation(
    lengths: np.ndarray, *, step: int, steps: int, data_parallel_size: int, num_microbatches: int
) -> list[Rows]:
    """Plan step `step % steps` of an evaluation: all pairs once, in file order."""
    samples = np.array_split(np.arange(len(lengths)), steps)[step % steps]
    return lay_out(samples, lengths, data_parallel_size, num_microbatches)
