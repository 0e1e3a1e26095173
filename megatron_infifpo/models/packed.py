"""Run a GPTModel on packed rows of whole responses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_infifpo.data import Row
from megatron_infifpo.logprobs import response_logprobs


@dataclass
class RowParams(PackedSeqParams):
    """What the local layers know of a row beside its segments.

    Attributes:
        positions: int64 `[T]`, every token's position in its text.
        key_rows: int64 `[T_kv]`, where the keys and values of the segments lie in the row, one
            segment after the other; None where they lie as the queries do.
    """

    positions: Tensor | None = None
    key_rows: Tensor | None = None


class RowRope(torch.nn.Module):
    """Megatron's rotary embedding, but of the positions that a row states.

    Megatron restarts at 0 in every segment, which is wrong for a response whose prompt lies in
    another one. Its packed rotation also waits for the GPU in every layer, to learn the segments.
    """

    def __init__(self, angles: torch.nn.Module):
        """Take the embedding that the model was built with."""
        super().__init__()
        self.angles = angles

    def get_rotary_seq_len(self, *arguments: Any) -> RowParams:
        """Hand `forward` the row in place of a length."""
        assert isinstance(arguments[-1], RowParams), "local layers need the positions of a row"
        return arguments[-1]

    def forward(self, row: RowParams, **options: Any) -> Tensor:
        """Return the angles `[..., T, 1, 1, dim]` of the row's tokens."""
        assert row.positions is not None
        whole: Tensor = self.angles(row.max_seqlen_kv, **options)
        return whole.index_select(whole.dim() - 4, row.positions)


def to_device(row: Row) -> Row:
    """Move a collated row to this rank's device."""
    device = torch.cuda.current_device()
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in row.items()}


def packed_params(model: torch.nn.Module, row: Row) -> PackedSeqParams:
    """Describe a row to the model's layers.

    Args:
        model: a GPTModel chunk, wrapped or not.
        row: cu_seqlens, max_seqlen and position_ids, and with shared prompts cu_seqlens_kv,
            max_seqlen_kv and key_rows, as `packing.collate` makes them.
    """
    borders, longest = row["cu_seqlens"], row["max_seqlen"]
    segments = {
        "cu_seqlens_q": borders,
        "cu_seqlens_kv": row.get("cu_seqlens_kv", borders),
        "max_seqlen_q": longest,
        "max_seqlen_kv": row.get("max_seqlen_kv", longest),
    }
    if get_model_config(model).transformer_impl != "local":
        assert "key_rows" not in row, "Transformer Engine's attention takes no shared prompts"
        return PackedSeqParams(qkv_format="thd", **segments)
    # Not "thd": Megatron would rotate by its own positions.
    return RowParams(
        qkv_format="sbhd",
        positions=row["position_ids"].flatten(),
        key_rows=row.get("key_rows"),
        **segments,
    )


def run_packed(model: torch.nn.Module, row: Row, vocab_size: int) -> Tensor:
    """Run one row through this pipeline stage.

    Args:
        model: a GPTModel chunk, wrapped by Megatron's DDP or not.
        row: a collated row on this device.
        vocab_size: real vocabulary, without padding.

    Returns:
        On the last stage the `[K]` log-probs of the row's response tokens, else hidden states.
    """
    scored = {"scored_rows": row["scored_rows"], "target_ids": row["target_ids"]}
    output: Tensor = model(
        row["tokens"],
        row["position_ids"],
        None,
        packed_seq_params=packed_params(model, row),
        output_processor=response_logprobs,
        output_processor_context={**scored, "vocab_size": vocab_size},
    )
    return output


def score_rows(
    models: Sequence[torch.nn.Module],
    rows: Sequence[Row],
    vocab_size: int,
    on_row: Callable[[Row], None] | None = None,
) -> list[Tensor]:
    """Run rows forward through all pipeline stages, without gradients.

    Args:
        models: this rank's chunks of the model.
        rows: collated rows.
        vocab_size: real vocabulary, without padding.
        on_row: called with each row once this rank has done its part of it.

    Returns:
        The `[K]` float32 log-probs of each row on the last pipeline stage, else an empty list.
    """

    def forward_step(rows: Iterator[Row], model: torch.nn.Module) -> tuple[Tensor, partial[Any]]:
        row = next(rows)
        output = run_packed(model, to_device(row), vocab_size)
        if on_row is not None:
            on_row(row)
        return output, partial(_collect)

    iterators = [iter(rows) for _ in models]
    with torch.no_grad():
        results: list[Tensor] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=list(models),
            num_microbatches=len(rows),
            seq_length=1,  # rows have lengths of their own, which the stages exchange
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results


def _collect(logprobs: Tensor, non_loss_data: bool = True) -> Tensor:
    """Hand a row's log-probs through Megatron's schedule as they are."""
    return logprobs.cpu()
