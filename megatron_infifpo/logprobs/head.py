"""Log-probs over a vocabulary that is split over ranks, with a backward pass that recomputes."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_infifpo.logprobs.products import (
    add_product,
    chunk_bytes_on,
    logit_chunks,
    precise,
    product,
    weight_gradient,
)


class TopLogprobs(NamedTuple):
    """Log-probs at given ids, and at the most probable ones."""

    logprobs: Tensor
    """`[K, k + n]`, of the given ids, then of the n most probable, falling."""
    top_ids: Tensor
    """int64 `[K, n]`, the most probable ones."""


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
        first: int,
        valid: int,
        group: dist.ProcessGroup,
        chunk_bytes: int,
        own_top: int,
    ) -> tuple[Tensor, Tensor]:
        """Return `TopLogprobs` for `hidden` `[K, H]` and the shard `weight` `[V/TP, H]`.

        `targets` are `[K, k]`. The shard's first column is of the id `first`; `valid` columns of it
        are real, the rest padding.
        """
        shard, targets = weight[:valid], targets - first
        logsumexp = hidden.new_full(hidden.shape[:1], -torch.inf, dtype=precise(hidden.dtype))
        places = targets.clamp(0, max(0, valid - 1))
        target_logits = logsumexp.new_zeros(targets.shape)
        top = _Top(logsumexp, own_top, valid)
        ctx.last = None
        for part, logits in logit_chunks(hidden, shard, chunk_bytes):
            target_logits[part] = logits.gather(1, places[part])
            top.add(part, logits)
            highest = logits.amax(dim=-1, keepdim=True)
            total = logits.sub_(highest).exp_().sum(dim=-1)
            logsumexp[part] = total.log_().add_(highest.squeeze(1))
            ctx.last = (part, logits, highest)
        target_logits *= (targets >= 0) & (targets < valid)
        if dist.get_world_size(group) > 1:
            # Two collectives for the whole row, however many chunks: shift by the common maximum,
            # then add up all sums at once.
            highest = logsumexp.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.cat([(logsumexp - highest).exp()[:, None], target_logits], dim=1)
            dist.all_reduce(sums, group=group)
            logsumexp, target_logits = sums[:, 0].log() + highest, sums[:, 1:]
        if own_top:
            values, ids = top.of_all(first, group)
            target_logits = torch.cat([target_logits, values], dim=1)
            targets = torch.cat([targets, ids - first], dim=1)
            places = targets.clamp(0, max(0, valid - 1))
        else:
            ids = targets[:, :0]
        here = (targets >= 0) & (targets < valid)
        ctx.save_for_backward(hidden, weight, logsumexp, places, here)
        ctx.weight, ctx.valid, ctx.chunk_bytes = weight, valid, chunk_bytes
        ctx.mark_non_differentiable(ids)
        return target_logits - logsumexp[:, None], ids

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple:
        """Gradients `[K, H]` (partial sum over the group) and `[V/TP, H]`."""
        hidden, weight, logsumexp, places, here = ctx.saved_tensors
        upstream = grad_outputs[0].to(logsumexp.dtype)
        total, upstream = -upstream.sum(dim=1, keepdim=True), upstream * here
        shard, grad_hidden = weight[: ctx.valid], torch.zeros_like(hidden)
        accumulator = grad_weight = None
        if ctx.needs_input_grad[1]:  # not of a frozen weight
            accumulator, grad_weight = weight_gradient(ctx.weight, logsumexp.dtype)

        def add(part: slice, grad: Tensor) -> None:
            """Propagate one chunk, given the part of its logits' gradient that has p(v)."""
            # d log p(t) / d logit(v) = [v = t] - p(v)
            grad.scatter_add_(1, places[part], upstream[part])
            grad = grad.to(hidden.dtype)
            grad_hidden[part] = product(grad, shard)
            if accumulator is not None:
                add_product(accumulator[: ctx.valid], grad.t(), hidden[part])

        rest = hidden
        if ctx.last is not None:
            part, exponentials, highest = ctx.last
            ctx.last = None  # changed in place: a second backward pass recomputes it
            shift = (highest - logsumexp[part, None]).exp_()
            add(part, exponentials.mul_(shift.mul_(total[part])))
            rest = hidden[: part.start]
            del exponentials  # before the others get a buffer
        for part, logits in logit_chunks(rest, shard, ctx.chunk_bytes):
            add(part, logits.sub_(logsumexp[part, None]).exp_().mul_(total[part]))
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, *[None] * 6


class _Top:
    """The n largest logits of every row: first of a rank's shard, then of all."""

    def __init__(self, like: Tensor, most: int, valid: int):
        """Take a tensor `[K]` of the precision, n, and how many columns a shard has."""
        self._here = min(most, valid)
        self._values = like.new_full((len(like), most), -torch.inf)
        self._ids = torch.zeros_like(self._values, dtype=torch.int64)

    def add(self, part: slice, logits: Tensor) -> None:
        """Look at the logits `[rows, valid]` of some rows."""
        if self._here:
            found = logits.topk(self._here, dim=1)
            self._values[part, : self._here] = found.values
            self._ids[part, : self._here] = found.indices

    def of_all(self, first: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """Return values and ids `[K, n]` over all shards; `first` is the id of this one's first."""
        values, ids, ranks = self._values, self._ids + first, dist.get_world_size(group)
        if ranks == 1:
            return values, ids
        all_values = [torch.empty_like(values) for _ in range(ranks)]
        all_ids = [torch.empty_like(ids) for _ in range(ranks)]
        dist.all_gather(all_values, values, group=group)
        dist.all_gather(all_ids, ids, group=group)
        found = torch.cat(all_values, dim=1).topk(values.shape[1], dim=1)
        return found.values, torch.cat(all_ids, dim=1).gather(1, found.indices)


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
        targets: `[K]` token ids, or `[K, k]` of which those below 0 are padding.
        vocab_size: real vocabulary; columns beyond it are padding and take no part.
        group: the tensor-parallel group.
        chunk_bytes: logits held at once on this rank; by default `CHUNK_BYTES` of the device.

    Returns:
        The shape of the targets, in float32 (float64 for float64 input); 0, without a gradient,
        at padding. The gradient of `hidden` is partial: sum it over `group`, as `response_logprobs`
        does.
    """
    ids = targets[:, None] if targets.dim() == 1 else targets
    found, _ = vocab_parallel_top(
        hidden, weight, ids, 0, vocab_size=vocab_size, group=group, chunk_bytes=chunk_bytes
    )
    return found.squeeze(1) if targets.dim() == 1 else found


def vocab_parallel_top(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    own_top: int,
    *,
    vocab_size: int,
    group: dist.ProcessGroup,
    chunk_bytes: int | None = None,
) -> TopLogprobs:
    """Log-probs at the targets `[K, k]`, and at the `own_top` ids that are the most probable ones.

    See `vocab_parallel_logprobs` for the other arguments. All are differentiable, with the choice
    of the most probable ids taken as given.

    Raises:
        ValueError: there are fewer than `own_top` ids.
    """
    if own_top > vocab_size:
        raise ValueError(f"own_top is {own_top}, expected at most {vocab_size}, the vocabulary")
    first = dist.get_rank(group) * weight.shape[0]
    valid = max(0, min(weight.shape[0], vocab_size - first))
    if chunk_bytes is None:
        chunk_bytes = chunk_bytes_on(hidden.device)
    logprobs, ids = _VocabParallelLogprobs.apply(
        hidden, weight, targets, first, valid, group, chunk_bytes, own_top
    )
    if targets.shape[1] > 1:  # one id a row is the response's own, and never padding
        padding = torch.nn.functional.pad(targets < 0, (0, own_top))
        logprobs = logprobs.masked_fill(padding, 0.0)
    return TopLogprobs(logprobs, ids)
