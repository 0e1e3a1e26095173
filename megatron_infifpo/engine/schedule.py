"""Megatron's pipeline schedules, told beforehand how long every row is."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    _build_default_pg_collection,
    get_schedule_table,
)
from megatron.core.utils import get_model_config

from megatron_infifpo.rows import Row


def transfers(
    lengths: Sequence[int], *, stage: int, stages: int, chunks: int, group: int
) -> tuple[list[int], list[int]]:
    """Lengths of what a stage receives in a step, from the stage before and from the one after.

    Rows arrive in the order in which the neighbour works on them. With several chunks a stage,
    what the last stage has done goes on to the first one, but for the last chunk's.

    Args:
        lengths: of the rows of a step.
        stage, stages: this pipeline stage, and how many there are.
        chunks: of the model on each stage (virtual stages).
        group: rows that a chunk takes in a row before the next chunk has its turn.
    """
    table = get_schedule_table(len(lengths), chunks, group)
    every = [lengths[row] for row, _ in table]
    around = [lengths[row] for row, chunk in table if chunk < chunks - 1]
    return (around if stage == 0 else every), (around if stage == stages - 1 else every)


class PlannedCommunicator(P2PCommunicator):
    """Passes activations on, of shapes that every stage knows.

    Megatron's sends each shape ahead and waits for the GPU to read it, every time.
    """

    def __init__(self, config: ModelParallelConfig, lengths: Sequence[int], chunks: int):
        """Take the tokens of each row of a step, and the chunks of the model on this stage."""
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        share = config.tensor_model_parallel_size if config.sequence_parallel else 1
        before, after = transfers(
            [length // share for length in lengths],
            stage=self.current_stage,
            stages=self.total_stages,
            chunks=chunks,
            group=config.microbatch_group_size_per_vp_stage or len(lengths),
        )
        self.before, self.after = iter(before), iter(after)

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[list[int], list[int]]:
        """Return the shapes `[T, 1, H]` of the next tensors to receive; nothing is sent."""
        return self._shape(self.before, recv_prev), self._shape(self.after, recv_next)

    def _shape(self, lengths: Iterator[int], receives: bool) -> list[int]:
        return [next(lengths), 1, self.config.hidden_size] if receives else []


def get_schedule(**options: Any) -> Callable[..., list[Any]]:
    """Megatron's `get_forward_backward_func`, for steps of rows whose lengths differ.

    The schedule that it returns takes all rows of a step at its start, where Megatron's takes each
    as it comes to it: that is how stages know what they will receive.
    """
    schedule = get_forward_backward_func(**options)

    def run(
        *,
        data_iterator: Iterator[Row] | list[Iterator[Row]],
        model: Any,
        num_microbatches: int,
        p2p_communicator: None = None,
        pg_collection: None = None,
        **others: Any,
    ) -> list[Any]:
        chunks = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        rows = [next(chunks[0]) for _ in range(num_microbatches)]
        taken = [iter(rows), *chunks[1:]]  # every chunk has its own iterator over the same rows
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            lengths = [row["tokens"].numel() for row in rows]
            config = get_model_config(model[0] if isinstance(model, list) else model)
            others["p2p_communicator"] = PlannedCommunicator(config, lengths, len(chunks))
            others["pg_collection"] = _build_default_pg_collection()
        results: list[Any] = schedule(
            data_iterator=taken if len(chunks) > 1 else taken[0],
            model=model,
            num_microbatches=num_microbatches,
            **others,
        )
        return results

    return run
