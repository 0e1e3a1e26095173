"""The log-prob head: from hidden states to the log-prob of every response token.

Only rows that predict a response token reach the output layer. Their log-probs are computed in
chunks, with the vocabulary split over tensor-parallel ranks. The backward pass begins with the last
chunk, which is still there, and recomputes the logits of the others. Peak memory is
O(chunk x V / TP), never O(tokens x V), beside the weight's gradient.

Symbols: `T` tokens of a row, `K` scored tokens, `H` hidden size, `V` vocabulary, `S` segments.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of one chunk in float32, per rank: large enough for full-speed matrix products.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}


def chunk_bytes_on(device: torch.device) -> int:
    """Bytes of a chunk of float32 logits on a device."""
    return CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]


class _VocabParallelLogprobs(torch.autograd.Function):
    """Log-softmax at the targets, with this rank's vocabulary shard of the output weight.

    Saves hidden rows, one log-sum-exp a row, and the last chunk: the backward pass comes next, and
    would need a buffer of that size anyway. The gradient of the hidden rows is this shard's part
    only: the caller's mapping sums it over the group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: int,
        group: dist.ProcessGroup,
        chunk_bytes: int,
    ) -> Tensor:
        """Return `[K]` log-probs for `hidden` `[K, H]` and the shard `weight` `[V/TP, H]`.

        `targets` `[K]` are relative to the shard; `valid` columns of it are real, the rest padding.
        """
        shard, here = weight[:valid], (targets >= 0) & (targets < valid)
        targets = targets.clamp(0, max(0, valid - 1))
        logsumexp = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=_precise(hidden.dtype))
        target_logits = torch.zeros_like(logsumexp)
        ctx.last = None
        for part, logits in _chunks(hidden, shard, chunk_bytes):
            target_logits[part] = logits.gather(1, targets[part, None]).squeeze(1)
            highest = logits.amax(dim=-1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(dim=-1)
            logsumexp[part] = total.log_().add_(highest.squeeze(1))
            ctx.last = (part, logits, highest)
        target_logits *= here
        if dist.get_world_size(group) > 1:
            # Two collectives for the whole row, however many chunks: shift by the common maximum,
            # then add up both sums at once.
            highest = logsumexp.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack([(logsumexp - highest).exp(), target_logits])
            dist.all_reduce(sums, group=group)
            logsumexp, target_logits = sums[0].log() + highest, sums[1]
        ctx.save_for_backward(hidden, weight, logsumexp, targets, here)
        ctx.weight, ctx.valid, ctx.chunk_bytes = weight, valid, chunk_bytes
        return target_logits - logsumexp

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        """Gradients `[K, H]` (partial sum over the group) and `[V/TP, H]`."""
        hidden, weight, logsumexp, targets, here = ctx.saved_tensors
        upstream = grad_outputs[0].to(logsumexp.dtype)
        shard, grad_hidden = weight[: ctx.valid], torch.zeros_like(hidden)
        accumulator, grad_weight = _weight_gradient(ctx.weight, logsumexp.dtype)

        def add(part: slice, grad: Tensor) -> None:
            """Propagate one chunk, given the part of its logits' gradient that has p(v)."""
            # d log p(t) / d logit(v) = [v = t] - p(v)
            grad.scatter_add_(1, targets[part, None], (upstream[part] * here[part])[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = _product(grad, shard)
            _add_product(accumulator[: ctx.valid], grad.t(), hidden[part])

        rest = hidden
        if ctx.last is not None:
            part, exponentials, highest = ctx.last
            ctx.last = None  # changed in place: a second backward pass recomputes it
            shift = (highest - logsumexp[part, None]).exp_()
            add(part, exponentials.mul_(shift.mul_(-upstream[part, None])))
            rest = hidden[: part.start]
            del exponentials  # before the others get a buffer
        for part, logits in _chunks(rest, shard, ctx.chunk_bytes):
            add(part, logits.sub_(logsumexp[part, None]).exp_().mul_(-upstream[part, None]))
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunks(hidden: Tensor, shard: Tensor, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their logits `[rows, valid]`, in float32 at least; all in the same buffer."""
    if len(shard) == 0 or len(hidden) == 0:  # all of this rank's columns are padding, or all done
        return
    most = max(1, chunk_bytes // (4 * len(shard)))
    rows = math.ceil(len(hidden) / math.ceil(len(hidden) / most))  # equal chunks
    buffer = hidden.new_empty(rows, len(shard), dtype=_precise(hidden.dtype))
    for start in range(0, len(hidden), rows):
        part = slice(start, min(start + rows, len(hidden)))
        yield part, _product(hidden[part], shard.t(), out=buffer[: part.stop - start])


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product in float32 at least; of halves too, which are not rounded in between."""
    if out is None:
        out = left.new_empty(len(left), right.shape[1], dtype=_precise(left.dtype))
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    if left.device.type == "cpu":  # which has no such kernel
        return out.copy_(left @ right)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to `total`, in its data type, without a tensor in between on a GPU."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.device.type == "cpu":
        total += left @ right
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def _weight_gradient(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
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


def vocab_parallel_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_bytes: int | None = None,
) -> Tensor:
    """Log-prob of each target token, differentiable with respect to `hidden` and `weight`.

    Args:
        hidden: `[K, H]`, equal on all ranks of `group`.
        weight: `[V_padded / TP, H]`, this rank's shard of the output layer.
        targets: `[K]` token ids.
        vocab_size: real vocabulary; columns beyond it are padding and take no part.
        group: the tensor-parallel group.
        chunk_bytes: logits held at once on this rank; by default `CHUNK_BYTES` of the device.

    Returns:
        `[K]` in float32 (float64 for float64 input). The gradient of `hidden` is partial: sum it
        over `group`, as `response_logprobs` does.
    """
    first = dist.get_rank(group) * weight.shape[0]
    valid = max(0, min(weight.shape[0], vocab_size - first))
    if chunk_bytes is None:
        chunk_bytes = chunk_bytes_on(hidden.device)
    logprobs: Tensor = _VocabParallelLogprobs.apply(
        hidden, weight, targets - first, valid, group, chunk_bytes
    )
    return logprobs


def response_logprobs(
    *,
    hidden_states: Tensor,
    output_layer: Any,
    output_weight: Tensor | None,
    config: Any,
    context: dict[str, Any],
    **_: Any,
) -> Tensor:
    """Megatron's `output_processor`: log-probs of the response tokens of a packed row.

    Args:
        hidden_states: `[T, 1, H]` (`[T / TP, 1, H]` under sequence parallelism).
        output_layer: Megatron's ColumnParallelLinear over the vocabulary.
        output_weight: the embedding when the two are tied, else None.
        config: the TransformerConfig.
        context: `scored_rows` `[K]`, the rows that predict a response token; `target_ids` `[K]`;
            `vocab_size`.

    Returns:
        `[K]` float32.
    """
    from megatron.core.tensor_parallel import mappings  # here: the rest needs no Megatron

    group = output_layer.tp_group
    # The weight is read without calling the layer, so what Megatron hangs on that call runs here:
    # under --overlap-param-gather it waits until the weight has arrived.
    for hook in output_layer._forward_pre_hooks.values():
        hook(output_layer, ())
    weight = output_layer.weight if output_weight is None else output_weight
    rows = context["scored_rows"]
    if config.sequence_parallel:
        full = mappings.gather_from_sequence_parallel_region(hidden_states, group=group)
        hidden = full.squeeze(1).index_select(0, rows)
    else:
        # Select first: the backward all-reduce then carries K rows instead of T.
        selected = hidden_states.squeeze(1).index_select(0, rows)
        hidden = mappings.copy_to_tensor_model_parallel_region(selected, group=group)
    return vocab_parallel_logprobs(
        hidden, weight, context["target_ids"], vocab_size=context["vocab_size"], group=group
    )


def segment_sums(token_logprobs: Tensor, segment_ids: Tensor, segments: int) -> Tensor:
    """Sum token log-probs by response: `[K]` and `[K]` in `[0, S)` to `[S]`."""
    return token_logprobs.new_zeros(segments).index_add(0, segment_ids, token_logprobs)
