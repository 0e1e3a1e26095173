"""Plans: which pairs a step takes, and which pairs share a row; no tokens are touched.

A row is one micro-batch: whole pairs, packed (see `packing`). Every plan is a pure function of its
arguments, so a run resumes exactly, and a shard has the same rows on any number of ranks.
"""

import functools
import heapq

import numpy as np

from megatron_infifpo.errors import UserError

Rows = list[list[int]]
"""Positions of the samples of each row."""


def spread(samples: np.ndarray, lengths: np.ndarray, rows: int) -> Rows:
    """Spread samples over so many rows by token count: longest first, onto the least-loaded row.

    Rows come back longest first, so the ones that data-parallel ranks compute at the same time
    (neighbours) are of like length, and a run that lacks memory fails in its first micro-batch.
    """
    assert len(samples) >= rows, f"{len(samples)} samples cannot fill {rows} rows"
    loads = [(0, row) for row in range(rows)]
    plan: Rows = [[] for _ in range(rows)]
    costs = lengths[samples]
    for position in np.argsort(-costs, kind="stable").tolist():
        load, row = heapq.heappop(loads)
        plan[row].append(int(samples[position]))
        heapq.heappush(loads, (load + int(costs[position]), row))
    return [plan[row] for _, row in sorted(loads, key=lambda item: (-item[0], item[1]))]


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
    lengths: np.ndarray, *, seed: int, step: int, global_batch_size: int, rows: int
) -> Rows:
    """Plan one training step.

    The stream of samples is one permutation of all pairs after the other; step `s` takes its
    samples `[s * global_batch_size, (s + 1) * global_batch_size)`, across the end of an epoch too.

    Args:
        lengths: `[N]` tokens of each pair.
        seed: of the permutations, >= 0.
        step: from 0.
        global_batch_size: pairs of a step; may exceed N.
        rows: data-parallel size x micro-batches; the ranks share the first data_parallel_size
            rows in their first micro-batch, and so on.

    Returns:
        Positions in `lengths` by row; no row is empty.
    """
    first, count = step * global_batch_size, len(lengths)
    stream = np.arange(first, first + global_batch_size)
    epochs, offsets = stream // count, stream % count
    samples = np.empty(global_batch_size, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        taken = epochs == epoch
        samples[taken] = permutation(count, seed, epoch)[offsets[taken]]
    return spread(samples, lengths, rows)


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
    rows_a_rank = global_batch_size // data_parallel_size
    for size in range(rows_a_rank, 1, -1):
        if rows_a_rank % size:
            continue
        rows = global_batch_size // size
        plans = (
            plan_step(lengths, seed=seed, step=s, global_batch_size=global_batch_size, rows=rows)
            for s in range(steps)
        )
        if all(lengths[row].sum() <= row_tokens for plan in plans for row in plan):
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


def plan_evaluation(lengths: np.ndarray, *, step: int, steps: int, rows: int) -> Rows:
    """Plan step `step % steps` of an evaluation: all pairs once, in file order."""
    samples = np.array_split(np.arange(len(lengths)), steps)[step % steps]
    return spread(samples, lengths, rows)
