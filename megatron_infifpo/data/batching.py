"""Batches: which pairs a step takes, how they are spread over rows, and how a row is packed.

A row is one micro-batch: whole pairs in one packed (THD) sequence
`[prompt chosen_1 | prompt rejected_1 | prompt chosen_2 | ...]`, each response a segment with its
own copy of the prompt, or with one copy for all of a pair. Every plan is a pure function of its
arguments, so a run resumes exactly.
"""

import functools
import heapq
import warnings
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from megatron_infifpo.cli import UserError
from megatron_infifpo.data import Row
from megatron_infifpo.data.preference_dataset import PreferenceDataset, PreferencePair

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
        rows: data-parallel size x micro-batches; micro-batch `m` of rank `d` is row
            `m * data_parallel_size + d`.

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


def collate(
    pairs: Sequence[PreferencePair],
    *,
    pad_multiple: int = 1,
    pad_token: int = 0,
    share_prompt: bool = False,
) -> Row:
    """Pack pairs into one row.

    B pairs, R responses, S = B R segments, K scored tokens, T tokens of the row, M sources.

    Args:
        pairs: B of them, all with R responses and the same sources.
        pad_multiple: T is padded to a multiple of this (the tensor-parallel size under sequence
            parallelism). The tail is an attention segment of its own and is never scored.
        pad_token: token of the tail.
        share_prompt: hold a pair's prompt once, `[prompt chosen | rejected]`: the segments of the
            other responses have the prompt's keys and values beside their own.

    Returns:
        tokens int64 `[1, T]`; position_ids int64 `[1, T]`, in the text that a token is of;
        cu_seqlens int32 `[S + 1]` (one more with a tail); max_seqlen int; scored_rows int64 `[K]`,
        positions whose hidden state predicts a response token; target_ids int64 `[K]`, those
        tokens; segment_ids int64 `[K]`, b * R + r; token_counts int64 `[B, R]`; indices and
        domain_codes int64 `[B]`; with log-probs initial_sum_logps float32 `[B, R]`,
        source_sum_logps float32 `[B, R, M]`, source_token_counts int64 `[B, R, M]`, source_mask
        bool `[B, M]`; and with shared prompts the segments of the keys, cu_seqlens_kv int32
        `[S + 1]`, max_seqlen_kv int, and key_rows int64 `[T_kv]`, where they lie in the row.
    """
    counts = np.array([[len(ids) for ids in pair.response_ids] for pair in pairs], dtype=np.int64)
    tokens: list[np.ndarray] = []
    # By segment: its tokens, those of its keys, and ranges `(start, length)` in the row.
    queries: list[int] = []
    keys: list[int] = []
    positions: list[tuple[int, int]] = []
    key_rows: list[tuple[int, int]] = []
    scored: list[tuple[int, int]] = []
    start = 0
    for pair in pairs:
        prompt, begin = len(pair.prompt_ids), start
        for r, ids in enumerate(pair.response_ids):
            shared = share_prompt and r > 0
            begin = begin if shared else start
            tokens += [ids] if shared else [pair.prompt_ids, ids]
            queries.append(len(ids) if shared else prompt + len(ids))
            keys.append(prompt + len(ids))
            positions.append((prompt if shared else 0, queries[-1]))
            start += queries[-1]
            own = (start - len(ids), len(ids))
            key_rows += [(begin, prompt), own]
            # Hidden row t predicts token t + 1, and the prompt's last one the first of a response.
            scored += [(begin + prompt - 1, 1), (own[0], own[1] - 1)]
    if tail := -start % pad_multiple:
        tokens.append(np.full(tail, pad_token))
        queries.append(tail)
        keys.append(tail)
        positions.append((0, tail))
        key_rows.append((start, tail))
    flat = counts.flatten()
    row: Row = {
        "tokens": torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None],
        "position_ids": _ranges(positions)[None],
        "cu_seqlens": _borders(queries),
        "max_seqlen": max(queries),
        "scored_rows": _ranges(scored),
        "target_ids": torch.from_numpy(
            np.concatenate([ids for pair in pairs for ids in pair.response_ids]).astype(np.int64)
        ),
        "segment_ids": torch.from_numpy(np.repeat(np.arange(counts.size), flat)),
        "token_counts": torch.from_numpy(counts),
        "indices": torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
        "domain_codes": torch.tensor([pair.domain_code for pair in pairs], dtype=torch.int64),
    }
    if share_prompt:
        row |= {"cu_seqlens_kv": _borders(keys), "max_seqlen_kv": max(keys)}
        row["key_rows"] = _ranges(key_rows)
    if pairs[0].initial_sum_logps is not None:
        for name in (
            "initial_sum_logps",
            "source_sum_logps",
            "source_token_counts",
            "source_mask",
        ):
            row[name] = torch.from_numpy(np.stack([getattr(pair, name) for pair in pairs]))
    return row


def _borders(lengths: Sequence[int]) -> torch.Tensor:
    """Return where segments of these lengths begin and end, int32 `[S + 1]`."""
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def _ranges(pieces: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return start ... start + length - 1 for each piece, joined, int64."""
    return torch.from_numpy(
        np.concatenate([np.arange(start, start + length) for start, length in pieces])
    )


class PreferenceLoader:
    """Endless iterator over the rows of one data-parallel rank; the step is its only state.

    Attributes:
        dataset: the pairs.
        indices: the eligible records, `[N]`.
        lengths: tokens of their packed pairs, `[N]`.
        rows: rows of a step over all ranks.
        step: the next step to plan.
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
            seed: of the order of the pairs.
            start_step: first step, from 0; any rank at any layout continues there exactly.

        Raises:
            UserError: no pair is eligible, or a step has more rows than pairs.
        """
        self.dataset = dataset
        self.packing = {"pad_multiple": pad_multiple, "share_prompt": share_prompt}
        self.rank, self.data_parallel_size = data_parallel_rank, data_parallel_size
        self.global_batch_size, self.seed, self.step = global_batch_size, seed, start_step
        self.rows = data_parallel_size * num_microbatches
        self.indices = dataset.require_eligible(max_tokens)
        self.lengths = dataset.pair_lengths(share_prompt=share_prompt)[self.indices]
        self._pending: list[list[int]] = []
        self._check()

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
        """Return the next micro-batch, collated."""
        if not self._pending:
            self._pending = self._plan(self.step)[self.rank :: self.data_parallel_size]
            self.step += 1
        positions = self._pending.pop(0)
        pairs = [self.dataset[int(self.indices[position])] for position in positions]
        return collate(pairs, **self.packing)  # type: ignore[arg-type]


class EvaluationLoader(PreferenceLoader):
    """The same over held-out pairs: each once in `evaluation_steps` steps, then all over again."""

    def _check(self) -> None:
        self.steps = evaluation_steps(len(self.indices), self.global_batch_size, self.rows)

    def _plan(self, step: int) -> Rows:
        return plan_evaluation(self.lengths, step=step, steps=self.steps, rows=self.rows)
