"""Endless iterators over the rows of a data-parallel rank."""

import itertools
import warnings
from collections.abc import Iterator
from typing import Self

import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import PLAIN, RowLayout
from megatron_infifpo.rows.packing import collate, pin
from megatron_infifpo.rows.pieces import cut
from megatron_infifpo.rows.plan import Rows, evaluation_steps, plan_evaluation, plan_step
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.rows.prefetch import prefetch


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
        layout: RowLayout = PLAIN,
        context_rank: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        start_step: int = 0,
    ) -> None:
        """Open the data; see `plan_step` for the arguments.

        Args:
            dataset: the pairs.
            global_batch_size: pairs of a step over all ranks.
            data_parallel_rank: this rank's.
            data_parallel_size: ranks that share a step.
            num_microbatches: rows of a step on each rank.
            max_tokens: longest response with its prompt; longer pairs are left out.
            layout: of the rows.
            context_rank: which rank's part of each row to hand out.
            pin_memory: rows are about to be copied to a GPU.
            seed: of the order of the pairs.
            start_step: first step on these pairs, from 0; any rank at any layout continues there
                exactly.

        Raises:
            UserError: no pair is eligible, or a step has more rows than pairs.
        """
        self.dataset = dataset
        self.layout, self.context_rank = layout, context_rank
        # Rows are pinned in a thread, which has a current device of its own.
        self.device = torch.cuda.current_device() if pin_memory else None
        self.rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.global_batch_size, self.seed, self.step = global_batch_size, seed, start_step
        self.num_microbatches = num_microbatches
        self.rows = data_parallel_size * num_microbatches
        self.indices = dataset.require_eligible(max_tokens)
        self.lengths = dataset.pair_lengths(layout)[self.indices]
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

    def _plan(self, step: int) -> list[Rows]:
        """Rows of all ranks."""
        return plan_step(
            self.lengths,
            seed=self.seed,
            step=step,
            global_batch_size=self.global_batch_size,
            data_parallel_size=self.data_parallel_size,
            num_microbatches=self.num_microbatches,
        )

    def __iter__(self) -> Self:
        """Return the loader."""
        return self

    def __next__(self) -> Row:
        """Return the next micro-batch, collated.

        Beside what `collate` and `cut` make: `ends_step`, whether it is the rank's last one of its
        step; and waste/NAME, float32 `[2]`, shares of the step that are wasted as `[share, 1]`.
        """
        return next(self._rows)

    def _collated(self) -> Iterator[Row]:
        """Rows for ever, step after step."""
        if self.device is not None:
            torch.cuda.set_device(self.device)
        for step in itertools.count(self.step):
            plan = self._plan(step)
            rows, waste = plan[self.rank], self._waste(plan)
            for number, positions in enumerate(rows, 1):
                pairs = [self.dataset[int(self.indices[position])] for position in positions]
                whole = collate(pairs, self.layout)
                row = cut(whole, self.layout.context_parallel, self.context_rank)
                row |= {f"waste/{name}": torch.tensor([x, 1.0]) for name, x in waste.items()}
                row["ends_step"] = number == len(rows)
                yield row if self.device is None else pin(row)

    def _waste(self, plan: list[Rows]) -> dict[str, float]:
        """Shares of a step: padding, and the time that ranks wait for the one with most tokens."""
        tokens = [[int(self.lengths[row].sum()) for row in rows] for rows in plan]
        padded = [sum(n + self.layout.padding(n) for n in share) for share in tokens]
        total = sum(padded)
        return {
            "padding": 1 - sum(map(sum, tokens)) / total,
            "imbalance": 1 - total / (len(plan) * max(padded)),
        }


class EvaluationLoader(PreferenceLoader):
    """The same over held-out pairs: each once in `evaluation_steps` steps, then all over again."""

    def _check(self) -> None:
        self.steps = evaluation_steps(len(self.indices), self.global_batch_size, self.rows)

    def _plan(self, step: int) -> list[Rows]:
        return plan_evaluation(
            self.lengths,
            step=step,
            steps=self.steps,
            data_parallel_size=self.data_parallel_size,
            num_microbatches=self.num_microbatches,
        )
