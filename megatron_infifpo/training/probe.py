"""Run the pivot on some records as it is now, and compare it with the initial log-probs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.training.training import disable_forward_pre_hook, enable_forward_pre_hook
from torch import Tensor

from megatron_infifpo.engine.packed import score_rows
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.megatron_args import gathers_before_forward
from megatron_infifpo.training.settings import Run

PROBES = 64


@dataclass(frozen=True)
class Difference:
    """One response under the pivot as it is now, and as it was scored.

    Attributes:
        index: of the record.
        response: index of the response, of those that are used.
        now: float32 `[L]`, log-probs of its tokens.
        initial: the same of the initial pivot, or `[1]`, their mean, where only sums are known.
    """

    index: int
    response: int
    now: np.ndarray
    initial: np.ndarray

    @property
    def by_token(self) -> np.ndarray:
        """Differences, `[L]`; the means' `[1]` where only sums are known."""
        known = len(self.now) == len(self.initial)
        return (self.now if known else self.now.mean(keepdims=True)) - self.initial

    @property
    def mean(self) -> float:
        """Mean difference, nats a token."""
        return float(self.by_token.mean())

    @property
    def size(self) -> float:
        """Mean absolute difference, nats a token; NaN counts as infinite."""
        size = float(np.abs(self.by_token).mean())
        return size if np.isfinite(size) else float("inf")


def probe_records(dataset: PreferenceDataset, max_tokens: int, count: int) -> np.ndarray:
    """Choose records, spread evenly over domains, and over lengths within each.

    Returns:
        int64 indices, ascending, of at most `count` records that training can use.
    """
    usable = dataset.eligible(max_tokens)
    usable = usable[np.argsort(dataset.segment_lengths[usable], kind="stable")]
    codes = dataset.domain_codes[usable]
    by_domain = sorted((usable[codes == code] for code in np.unique(codes)), key=len)
    chosen: list[int] = []
    for number, records in enumerate(by_domain):
        share = min(len(records), (count - len(chosen)) // (len(by_domain) - number))
        if share:
            chosen += records[np.linspace(0, len(records) - 1, share).round().astype(int)].tolist()
    return np.array(sorted(chosen), dtype=np.int64)


def compare(
    run: Run, models: Sequence[torch.nn.Module], dataset: PreferenceDataset
) -> list[Difference]:
    """Score the probe records with the model as it is; all ranks call it, and all get the result.

    Every data-parallel replica scores its share, in rows like those of training.
    """
    assert dataset.initial is not None
    records = probe_records(dataset, run.batch.max_tokens, run.config.reference_probes or PROBES)
    mine, size = share(records.tolist()), run.batch.micro
    groups = [mine[i : i + size] for i in range(0, len(mine), size)]
    rows = [collate([dataset[i] for i in group], run.batch.rows) for group in groups]
    found: list[Difference] = []

    def one() -> Row:
        return collate([dataset[int(records[0])]], run.batch.rows)

    for group, output in zip(groups, run_rows(run, models, rows, one), strict=False):
        found += _unpack(group, output, dataset)
    return from_all(found)


def share[T](items: Sequence[T]) -> Sequence[T]:
    """Return what this data-parallel replica runs of some items."""
    return items[mpu.get_data_parallel_rank() :: mpu.get_data_parallel_world_size()]


def run_rows(
    run: Run, models: Sequence[torch.nn.Module], rows: Sequence[Row], one: Callable[[], Row]
) -> list[Tensor]:
    """Run the model as it is on a replica's rows; all ranks call it.

    Args:
        run: that is about to start.
        models: this rank's chunks of the model.
        rows: of this replica.
        one: returns any row, for a replica that has none.

    Returns:
        The `[K]` log-probs of each row on the replica's first rank of the last pipeline stage, else
        an empty list.
    """
    count = len(rows)
    rows = _in_step(run, rows, one)
    if not rows:
        return []
    # Interleaved stages take rows by the pipeline's size.
    repeated = -len(rows) % run.layout.pipeline_parallel if len(models) > 1 else 0
    hooks = gathers_before_forward()
    if hooks:  # they would gather parameters that no optimizer step has changed yet
        disable_forward_pre_hook(models, param_sync=False)
    for model in models:
        model.eval()
    outputs = score_rows(models, [*rows, *[rows[0]] * repeated], run.vocab_size)
    for model in models:
        model.train()
    if hooks:
        enable_forward_pre_hook(models)
    first = mpu.get_tensor_model_parallel_rank() == mpu.get_context_parallel_rank() == 0
    return outputs[:count] if first else []


def _in_step(run: Run, rows: Sequence[Row], one: Callable[[], Row]) -> Sequence[Row]:
    """As many rows on all replicas: those that share experts ask them at the same time."""
    if not run.arguments["num_experts"]:
        return rows
    lacking = max(from_all([len(rows)])) - len(rows)
    return [*rows, *[rows[0] if rows else one()] * lacking] if lacking else rows


def from_all[T](found: list[T]) -> list[T]:
    """Return what all ranks have found, on every rank."""
    everyone: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    return [one for part in everyone for one in part]


def _unpack(group: Sequence[int], output: Tensor, dataset: PreferenceDataset) -> list[Difference]:
    """Split a row's log-probs into responses, each beside its initial values."""
    initial = dataset.initial
    assert initial is not None
    places = [(i, r, c) for i in group for r, c in enumerate(dataset.columns[i]) if c >= 0]
    lengths = [int(initial.token_counts[index, column]) for index, _, column in places]
    found, pieces = [], output.float().split(lengths)
    for (index, response, column), now in zip(places, pieces, strict=True):
        if initial.has_values:
            expected = initial.logprobs(index, column)
        else:
            expected = np.array([initial.sums(index)[column] / len(now)], np.float32)
        found.append(Difference(index, response, now.numpy(), expected))
    return found
