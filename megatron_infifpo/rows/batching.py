"""Batches: which pairs a step takes, and how they are spread over rows and ranks.

A row is one micro-batch: whole pairs, packed (see `packing`). Every plan is a pure function of its
arguments, so a run resumes exactly.
"""

import functools
import heapq
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.packing import collate, pin
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.rows.prefetch import prefetch

Rows = list[list[int]]


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the pairs in an epoch.

    From Philox's raw numbers: NumPy keeps them the same in every version, unlike `permutation`.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    order = np.argsort(bits.random_raw(count), kind="stable")
    order.flags.writeable = False  # it is cached
    return order


def _spread(samples: np.ndarray, lengths: np.ndarray, rows: int) -> Rows:
    """Spread samples over rows by token count: the longest first, onto the least-loaded row.

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
        samples[taken] = _permutation(count, seed, epoch)[offsets[taken]]
    return _spread(samples, lengths, rows)


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
            f"--micro-batch-tokens is {row_tokens}, but the longest pair has {longest} tokens: "
            "raise it, or leave out such pairs with a lower --seq-length"
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
    return _spread(samples, lengths, rows)


class PreferenceLoader:
    """Endless iterator over the rows of one data-parallel rank, prepared in a thread.

    Attributes:
        dataset: the pairs.
        indices: the eligible records, `[N]`.
        lengths: tokens of their packed pairs, `[N]`.
        rows: rows of a step over all ranks.
        step: the first step.
    """

    def __init__(
        self,
        dataset: PreferenceDataset,
        *,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        num_microbatches: int,
        max_tokens: int,
        pad_multiple: int = 1,
        share_prompt: bool = False,
        pin_memory: bool = False,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        """Take the layout; see `plan_step` and `collate` for the arguments.

        Args:
            dataset: the pairs.
            global_batch_size: pairs of a step over all ranks.
            data_parallel_rank: this rank's.
            data_parallel_size: ranks that share a step.
            num_microbatches: rows of a step on each rank.
            max_tokens: longest response with its prompt; longer pairs are left out.
            pad_multiple: rows are padded to a multiple of this.
            share_prompt: a row holds a pair's prompt once.
            pin_memory: rows are about to be copied to a GPU.
            seed: of the order of the pairs.
            start_step: first step, from 0; any rank at any layout continues there exactly.

        Raises:
            UserError: no pair is eligible, or a step has more rows than pairs.
        """
        self.dataset = dataset
        self.packing: dict[str, Any] = {"pad_multiple": pad_multiple, "share_prompt": share_prompt}
        # Rows are pinned in a thread, which has a current device of its own.
        self.device = torch.cuda.current_device() if pin_memory else None
        self.rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.global_batch_size, self.seed, self.step = global_batch_size, seed, start_step
        self.rows = data_parallel_size * num_microbatches
        self.indices = dataset.require_eligible(max_tokens)
        self.lengths = dataset.pair_lengths(share_prompt=share_prompt)[self.indices]
        self._check()
        # A step takes all of its rows at once: the next step's are ready by then.
        self._rows = prefetch(self._collated(), ahead=num_microbatches)

    def _check(self) -> None:
        if self.global_batch_size < self.rows:
            raise UserError(
                f"--global-batch-size is {self.global_batch_size} pairs for {self.rows} rows a "
                "step (data-parallel size x micro-batches), expected at least one pair a row"
            )
        if self.global_batch_size > len(self.indices):
            warnings.warn(
                f"--global-batch-size is {self.global_batch_size} and only {len(self.indices)} "
                f"pairs of {self.dataset.tokens.prefix} are left: a step takes pairs repeatedly",
                stacklevel=3,
            )

    def _plan(self, step: int) -> Rows:
        return plan_step(
            self.lengths,
            seed=self.seed,
            step=step,
            global_batch_size=self.global_batch_size,
            rows=self.rows,
        )

    def __iter__(self) -> Self:
        """Return the loader."""
        return self

    def __next__(self) -> Row:
        """Return the next micro-batch, collated.

        Beside what `collate` makes: `ends_step`, whether it is the rank's last one of its step;
        and waste/NAME, float32 `[2]`, shares of the step that are wasted as `[share, 1]`.
        """
        return next(self._rows)

    def _collated(self) -> Iterator[Row]:
        """Rows for ever, step after step."""
        if self.device is not None:
            torch.cuda.set_device(self.device)
        for step in itertools.count(self.step):
            rows, waste = self._share(self._plan(step))
            for number, positions in enumerate(rows, 1):
                pairs = [self.dataset[int(self.indices[position])] for position in positions]
                row = collate(pairs, **self.packing)
                row |= {f"waste/{name}": torch.tensor([x, 1.0]) for name, x in waste.items()}
                row["ends_step"] = number == len(rows)
                yield row if self.device is None else pin(row)

    def _share(self, plan: Rows) -> tuple[Rows, dict[str, float]]:
        """Return this rank's rows of a step, and the shares of the step that are wasted.

        Every other micro-batch is dealt from the other end, so that no rank has all the longest
        rows. Wasted are padding, and the time that ranks wait for the one with the most tokens.
        """
        size, shares = self.data_parallel_size, []
        for rank in range(size):
            ends = (rank, size - 1 - rank)
            shares.append([plan[m * size + ends[m % 2]] for m in range(len(plan) // size)])
        multiple = self.packing["pad_multiple"]
        tokens = [[int(self.lengths[row].sum()) for row in share] for share in shares]
        padded = [sum(-(-n // multiple) * multiple for n in share) for share in tokens]
        total = sum(padded)
        waste = {
            "padding": 1 - sum(map(sum, tokens)) / total,
            "imbalance": 1 - total / (size * max(padded)),
        }
        return shares[self.rank], waste


class EvaluationLoader(PreferenceLoader):
    """The same over held-out pairs: each once in `evaluation_steps` steps, then all over again."""

    def _check(self) -> None:
        self.steps = evaluation_steps(len(self.indices), self.global_batch_size, self.rows)

    def _plan(self, step: int) -> Rows:
        return plan_evaluation(self.lengths, step=step, steps=self.steps, rows=self.rows)
