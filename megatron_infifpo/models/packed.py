"""Run a GPTModel on one packed row of whole responses."""

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_infifpo.data import Row
from megatron_infifpo.logprobs import response_logprobs


def to_device(row: Row) -> Row:
    """Move a collated row to this rank's device."""
    device = torch.cuda.current_device()
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in row.items()}


def run_packed(model: torch.nn.Module, row: Row, vocab_size: int) -> Tensor:
    """Run one row through this pipeline stage.

    Args:
        model: a GPTModel chunk, wrapped by Megatron's DDP or not.
        row: a collated row on this device.
        vocab_size: real vocabulary, without padding.

    Returns:
        On the last stage the `[K]` log-probs of the row's response tokens, else hidden states.
    """
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=row["cu_seqlens"],
        cu_seqlens_kv=row["cu_seqlens"],
        max_seqlen_q=row["max_seqlen"],
        max_seqlen_kv=row["max_seqlen"],
    )
    scored = {"scored_rows": row["scored_rows"], "target_ids": row["target_ids"]}
    output: Tensor = model(
        row["tokens"],
        row["position_ids"],
        None,
        packed_seq_params=packed,
        output_processor=response_logprobs,
        output_processor_context={**scored, "vocab_size": vocab_size},
    )
    return output
