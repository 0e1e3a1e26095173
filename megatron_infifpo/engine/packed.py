"""Run a GPTModel on packed rows of whole responses."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_infifpo.engine.schedule import get_schedule
from megatron_infifpo.logprobs import TopLogprobs, response_logprobs
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.packing import pin
from megatron_infifpo.rows.pieces import cut


@dataclass
class RowParams(PackedSeqParams):
    """What our attention and rotary embedding know of a row beside its segments' borders.

    Attributes:
        query_lengths, key_lengths: tokens of every segment; lists, so that nobody asks a GPU.
        positions: int64 `[T]`, every token's position in its text.
        key_rows: int64 `[T_kv]`, where the keys and values of the segments lie in the row, one
            segment after the other; None where they lie as the queries do.
    """

    query_lengths: Sequence[int] = ()
    key_lengths: Sequence[int] = ()
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
        assert isinstance(arguments[-1], RowParams), "our layers need the positions of a row"
        return arguments[-1]

    def forward(self, row: RowParams, **options: Any) -> Tensor:
        """Return the angles `[..., T, 1, 1, dim]` of the row's tokens."""
        assert row.positions is not None
        options["packed_seq"] = True  # else Megatron returns this rank's share of a text alone
        # It keeps the angles of 32 lengths, and every row has another one.
        longest = 1 << (row.max_seqlen_kv - 1).bit_length()
        whole: Tensor = self.angles(longest, **options)
        return whole.index_select(whole.dim() - 4, row.positions)


def to_device(row: Row) -> Row:
    """Move a collated row to this rank's device; nobody waits for it where the row is pinned."""
    device = torch.cuda.current_device()
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in row.items()}


def row_params(row: Row) -> RowParams:
    """Describe a row to layers with our attention.

    Args:
        row: cu_seqlens, max_seqlen, segment_lengths and position_ids, and with shared prompts
            cu_seqlens_kv, max_seqlen_kv, key_lengths and key_rows, as `packing.collate` makes them.
    """
    return RowParams(
        qkv_format="sbhd",  # not "thd": Megatron would rotate by its own positions
        query_lengths=row["segment_lengths"],
        key_lengths=row["key_lengths" if "key_lengths" in row else "segment_lengths"],
        positions=row["position_ids"].flatten(),
        key_rows=row.get("key_rows"),
        **_borders(row),
    )


def te_params(row: Row) -> PackedSeqParams:
    """Describe a row to Transformer Engine's attention, which takes no shared prompts."""
    assert "key_rows" not in row, "Transformer Engine's attention takes no shared prompts"
    return PackedSeqParams(qkv_format="thd", **_borders(row))


def _borders(row: Row) -> dict[str, Any]:
    borders, longest = row["cu_seqlens"], row["max_seqlen"]
    return {
        "cu_seqlens_q": borders,
        "cu_seqlens_kv": row.get("cu_seqlens_kv", borders),
        "max_seqlen_q": longest,
        "max_seqlen_kv": row.get("max_seqlen_kv", longest),
    }


def packed_params(model: torch.nn.Module, row: Row) -> PackedSeqParams:
    """Describe a row to the layers of a GPTModel chunk, wrapped or not."""
    params: PackedSeqParams = get_model_config(model).layer_kind.params(row)
    return params


def run_packed(model: torch.nn.Module, row: Row, vocab_size: int) -> Tensor:
    """Run one row through this pipeline stage.

    Args:
        model: a GPTModel chunk, wrapped by Megatron's DDP or not.
        row: a collated row on this device; it may have soft_ids `[K, k]`, own_top and top_ids, as
            `logprobs.response_logprobs` takes them.
        vocab_size: real vocabulary, without padding.

    Returns:
        On the last stage what `logprobs.response_logprobs` does: the `[K]` log-probs of the row's
        response tokens, of all ranks of context parallelism, unless it asks for more; else hidden
        states.
    """
    places = row.get("scored_places")
    asked: dict[str, Any] = {"vocab_size": vocab_size}
    asked |= {name: row[name] for name in ("scored_rows", "own_top", "top_ids") if name in row}
    for name in ("target_ids", "soft_ids"):
        if name in row:
            asked[name] = row[name] if places is None else row[name][places]
    output: Tensor = model(
        row["tokens"],
        row["position_ids"],
        None,
        packed_seq_params=packed_params(model, row),
        output_processor=response_logprobs if places is None else partial(_of_all, row),
        output_processor_context=asked,
    )
    return output


def _of_all(row: Row, **options: Any) -> Any:
    """`response_logprobs` of the scored tokens that all ranks of context parallelism hold.

    Each rank goes on as if it had run the whole row: the gradient of a token's log-prob is that of
    the rank which holds it.
    """
    found = response_logprobs(**options)
    group = parallel_state.get_context_parallel_group()

    def joined(values: Tensor) -> Tensor:
        whole = values.new_zeros(len(row["target_ids"]), *values.shape[1:])
        whole = whole.index_copy(0, row["scored_places"], values)
        return reduce_from_tensor_model_parallel_region(whole, group=group)

    return joined(found) if isinstance(found, Tensor) else TopLogprobs(*map(joined, found))


def score_rows(
    models: Sequence[torch.nn.Module],
    rows: Sequence[Row],
    vocab_size: int,
    on_row: Callable[[Row], None] | None = None,
) -> list[Any]:
    """Run rows forward through all pipeline stages, without gradients.

    Args:
        models: this rank's chunks of the model.
        rows: collated rows, whole.
        vocab_size: real vocabulary, without padding.
        on_row: called with each row once this rank has done its part of it.

    Returns:
        On the last pipeline stage of each row its `[K]` float32 log-probs, or `TopLogprobs` of a
        row with `own_top`, on the CPU; else an empty list.
    """

    def forward_step(rows: Iterator[Row], model: torch.nn.Module) -> tuple[Tensor, partial[Any]]:
        row = next(rows)
        # Pinned one by one, while the device is busy with the row before.
        on_device = to_device(pin(row))
        output = run_packed(model, on_device | {"top_ids": "own_top" in row}, vocab_size)
        if on_row is not None:
            on_row(row)
        return output, partial(_collect)

    ranks = parallel_state.get_context_parallel_world_size()
    mine = [cut(row, ranks, parallel_state.get_context_parallel_rank()) for row in rows]
    iterators = [iter(mine) for _ in models]
    with torch.no_grad():
        results: list[Any] = get_schedule()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(models) > 1 else iterators[0],
            model=list(models),
            num_microbatches=len(rows),
            seq_length=1,  # rows have lengths of their own
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return [_on_cpu(found) for found in results]  # here, so that rows do not wait for each other


def _on_cpu[T: (Tensor, TopLogprobs)](found: T) -> T:
    return found.cpu() if isinstance(found, Tensor) else TopLogprobs(*(t.cpu() for t in found))


def _collect[T](found: T, non_loss_data: bool = True) -> T:
    """Hand what was found of a row through Megatron's schedule as it is."""
    return found
