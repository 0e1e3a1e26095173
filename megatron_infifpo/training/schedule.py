"""The schedule of a training step: ours, with all metrics of the step reduced at once."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_infifpo.engine.schedule import get_schedule
from megatron_infifpo.rows import Row


def training_schedule(
    count: Callable[[Row], int] | None = None,
) -> Callable[..., Callable[..., list[Any]]]:
    """Return what goes in the place of Megatron's `get_forward_backward_func`.

    Args:
        count: losses of a row, where losses on routers are added to them; see `RouterLosses`.
    """

    def get(**options: Any) -> Callable[..., list[Any]]:
        schedule = get_schedule(**options)
        routers = None if count is None else RouterLosses(count)

        @functools.wraps(schedule)
        def run(*, forward_only: bool = False, **others: Any) -> list[Any]:
            if routers is not None and not forward_only:
                others |= routers.begin_step(**others)
            reports = schedule(forward_only=forward_only, **others)
            return reports if forward_only or not reports else [reduced(reports)]

        return run

    return get


class RouterLosses:
    """Lets losses on routers be means over the tokens of a step.

    Megatron multiplies those of a row by its tokens, as if all gradients were divided by the tokens
    of a step in the end. They are divided by the number of losses, of pairs for example: these
    gradients would be as many times too large as a loss has tokens.
    """

    def __init__(self, count: Callable[[Row], int]):
        """Take what says how many losses a row has, of which one rank alone counts them."""
        self.count = count
        self.scale = torch.ones(1)

    def begin_step(
        self,
        *,
        data_iterator: Iterator[Row] | list[Iterator[Row]],
        model: Any,
        num_microbatches: int,
        **_: Any,
    ) -> dict[str, Any]:
        """Set the scale of a step in which these arguments of a schedule are used.

        Returns:
            Those of them that are others then.
        """
        several = isinstance(data_iterator, list)
        chunks = list(data_iterator) if isinstance(data_iterator, list) else [data_iterator]
        rows = [next(chunks[0]) for _ in range(num_microbatches)]
        self.scale = self._scale(rows)
        for chunk in model if isinstance(model, list) else [model]:
            config = get_model_config(chunk)
            config.moe_grad_scale_func = functools.partial(self._scaled, config)
        taken = [iter(rows), *chunks[1:]]
        return {"data_iterator": taken if several else taken[0]}

    def _scale(self, rows: Sequence[Row]) -> Tensor:
        """Losses a token, of all data-parallel ranks, `[1]`; ranks of a row have parts of it."""
        found = [sum(map(self.count, rows)), sum(row["tokens"].numel() for row in rows)]
        both = torch.tensor(found, dtype=torch.float32, device=torch.cuda.current_device())
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(both, group=group)
        return (both[0] / both[1]).view(1)

    def _scaled(self, config: Any) -> Tensor:
        """The scale, times that of float16's losses, in whose place Megatron takes it."""
        if config.grad_scale_func is None:
            return self.scale
        scaled: Tensor = config.grad_scale_func(self.scale)
        return scaled


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
