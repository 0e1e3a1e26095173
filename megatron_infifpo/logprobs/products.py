"""The head's matrix products: logits in chunks, and gradients into buffers that wait for them."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Logits of one chunk in float32, per rank: large enough for full-speed matrix products.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


def chunk_bytes_on(device: torch.device) -> int:
    """Bytes of a chunk of float32 logits on a device."""
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


def logit_chunks(hidden: Tensor, shard: Tensor, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their logits `[rows, valid]`, in float32 at least; all in the same buffer."""
    if len(shard) == 0 or len(hidden) == 0:  # all of this rank's columns are padding, or all done
        return
    most = max(1, chunk_bytes // (4 * len(shard)))
    rows = math.ceil(len(hidden) / math.ceil(len(hidden) / most))  # equal chunks
    buffer = hidden.new_empty(rows, len(shard), dtype=precise(hidden.dtype))
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        yield part, product(hidden[part], shard.t(), out=buffer[: part.stop - start])


def precise(dtype: torch.dtype) -> torch.dtype:
    """The data type that log-probs are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product in float32 at least; of halves too, which are not rounded in between."""
    if out is None:
        out = left.new_empty(len(left), right.shape[1], dtype=precise(left.dtype))
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":  # which has no such kernel
        return out.copy_(left @ right)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `total`, in its data type, without a tensor in between on a GPU."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        total += left @ right
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def weight_gradient(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return where to add the weight's gradient, and what to hand to autograd.

    Where Megatron keeps a gradient buffer (`main_grad`), the sum goes right into it, and autograd
    gets an empty stand-in: Megatron's hooks run as after its own fused linear layers. A tied
    embedding adds its own gradient to the stand-in, which then must be zero.
    """
    buffer = getattr(weight, "main_grad", None)
    if buffer is None or buffer.dtype != dtype:
        gradient = torch.zeros_like(weight, dtype=dtype)
        return gradient, gradient
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    tied = getattr(weight, "zero_out_wgrad", False)
    return buffer, torch.zeros_like(weight) if tied else torch.empty_like(weight)
