"""The schedule of a training step: ours, with all metrics of the step reduced at once."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_infifpo.engine.schedule import get_schedule


def get_training_schedule(**options: Any) -> Callable[..., list[Any]]:
    """In the place of Megatron's `get_forward_backward_func`, with its arguments."""
    schedule = get_schedule(**options)

    @functools.wraps(schedule)
    def run(*, forward_only: bool = False, **others: Any) -> list[Any]:
        reports = schedule(forward_only=forward_only, **others)
        return reports if forward_only or not reports else [reduced(reports)]

    return run


def reduced(reports: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average metrics over the rows of a step and all data-parallel ranks, in one collective.

    Args:
        reports: `[sum, count]` by name, of every row.

    Returns:
        The quotients by name. Megatron takes scalars as they are; of pairs it would reduce each
        apart.
    """
    rows = torch.stack([torch.stack(list(report.values())) for report in reports])  # [rows, N, 2]
    totals = rows.sum(dim=0)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(totals, group=group)
    return dict(zip(reports[0], totals[:, 0] / totals[:, 1], strict=True))
