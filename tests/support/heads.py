"""The log-prob head on ranks: gradients, alone and under a whole loss."""

from collections.abc import Callable

import torch


def head_gradients(seed: int, vocab: int, padded: int, dtype: str, chunk_bytes: int) -> dict:
    """Log-prob head over all ranks as one tensor-parallel group, and its gradients."""
    import torch.distributed as dist

    from megatron_infifpo.logprobs import vocab_parallel_logprobs

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(seed)
    rows, hidden_size = 13, 16
    hidden = torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(padded, hidden_size, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    upstream = torch.randn(rows, generator=generator, dtype=torch.float64)
    world, rank = dist.get_world_size(), dist.get_rank()
    kind = getattr(torch, dtype)
    shard = weight.chunk(world)[rank].to(kind).requires_grad_()
    hidden = hidden.to(kind).requires_grad_()
    world_group = dist.group.WORLD
    assert world_group is not None
    logprobs = vocab_parallel_logprobs(
        hidden, shard, targets, vocab_size=vocab, group=world_group, chunk_bytes=chunk_bytes
    )
    upstream = upstream.to(logprobs.dtype)
    first = torch.autograd.grad(logprobs, (hidden, shard), upstream, retain_graph=True)
    logprobs.backward(upstream)
    assert hidden.grad is not None and shard.grad is not None
    again = [
        (a - b).abs().max().item() for a, b in zip(first, (hidden.grad, shard.grad), strict=True)
    ]
    dist.all_reduce(hidden.grad)
    return {
        "again": max(again),
        "logprobs": logprobs.detach(),
        "hidden_grad": hidden.grad,
        "weight_grad": shard.grad,
    }


def _row(counts: torch.Tensor, random: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a loss reads of three records with three sources, beside the policy's log-probs."""
    return {
        "token_counts": counts,
        "initial_sum_logps": -3 * random(*counts.shape) * counts,
        "source_sum_logps": -5 * random(*counts.shape, 3) * counts[..., None],
        "source_token_counts": counts.clamp_min(1)[..., None].expand(-1, -1, 3),
        "source_mask": torch.tensor([[True] * 3, [True, False, True], [False] * 3]),
        "source_weights": torch.tensor([[0.5, 1.0, 2.0, 0.25]]).expand(len(counts), -1),
        "valid": counts > 0,
        "rewards": 2 * random(*counts.shape) - 1,
    }


def whole_loss_gradients(name: str, options: dict) -> list[tuple[float, float]]:
    """From hidden states over the head, sums, fusion and loss: gradients and finite differences.

    Float64, the vocabulary split over all ranks; (autograd, central difference) at some entries.
    """
    import torch.distributed as dist

    from megatron_infifpo.logprobs import segment_sums, vocab_parallel_logprobs
    from megatron_infifpo.methods import resolve
    from megatron_infifpo.training.objective import pair_losses

    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(17)
    method, pairs, vocab = resolve(name, **options), 3, 12
    counts = torch.tensor([[2, 3, 1], [1, 1, 4], [5, 2, 2]])[:, : method.responses]
    if method.responses is None:
        counts[1, 2] = 0  # a shorter list
    tokens = int(counts.sum())

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    hidden, weight = random(tokens, 6) - 0.5, 3 * (random(vocab, 6) - 0.5)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    segment_ids = torch.arange(counts.numel()).repeat_interleave(counts.flatten())
    row = _row(counts, random)
    world, rank = dist.get_world_size(), dist.get_rank()
    world_group = dist.group.WORLD
    assert world_group is not None

    def loss(hidden: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
        logprobs = vocab_parallel_logprobs(
            hidden, shard, targets, vocab_size=vocab, group=world_group
        )
        sums = segment_sums(logprobs, segment_ids, counts.numel()).view(pairs, -1)
        return pair_losses(method, row, sums, progress=0.5)[0].sum()

    parts = hidden.clone().requires_grad_(), weight.chunk(world)[rank].clone().requires_grad_()
    loss(*parts).backward()
    hidden_grad, shard_grad = (part.grad for part in parts)
    assert hidden_grad is not None and shard_grad is not None
    dist.all_reduce(hidden_grad)
    weight_grad = [torch.empty_like(shard_grad) for _ in range(world)]
    dist.all_gather(weight_grad, shard_grad)
    results = []
    for tensor, grad in ((hidden, hidden_grad), (weight, torch.cat(weight_grad))):
        for index in range(0, tensor.numel(), 5):
            ends, original = [], tensor.view(-1)[index].item()
            for sign in (1, -1):
                tensor.view(-1)[index] = original + sign * 1e-6
                ends.append(loss(hidden, weight.chunk(world)[rank]).item())
            tensor.view(-1)[index] = original
            results.append((grad.reshape(-1)[index].item(), (ends[0] - ends[1]) / 2e-6))
    return results


def dense_and_split(vocab: int, padded: int, chunk_bytes: int, own_top: int) -> dict[str, float]:
    """Losses of several ids a row, from our head on ranks and from dense autograd, in float64.

    Returns the largest differences, by what differs; one of ids is their number.
    """
    import torch.distributed as dist

    from megatron_infifpo.distillation import ghost_kl, renormalised_kl, topk_standardised_l1
    from megatron_infifpo.logprobs import vocab_parallel_top

    dist.init_process_group("gloo")
    world, rank, group = dist.get_world_size(), dist.get_rank(), dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows, k = 7, 4
    hidden, weight = random(rows, 6), random(padded, 6)
    weight[vocab:] = 9.0  # padding columns must not matter
    probs, ids = torch.softmax(2 * random(rows, vocab), 1).topk(k, 1)
    targets = torch.randint(0, vocab, (rows, 1), generator=generator)
    targets[0], ids[1, 2:], probs[1, 2:] = ids[0, 0], -1, 0.0  # an id twice, and padding
    values = (2 * random(rows, 9)).log_softmax(-1).sort(descending=True).values[:, :own_top]

    def losses(found: torch.Tensor) -> torch.Tensor:
        given, own = found[:, 1 : 1 + k], found[:, 1 + k :]
        tail = (1 - probs.sum(1)).clamp_min(0)
        parts = [-found[:, 0], ghost_kl(given, probs, tail), renormalised_kl(given, probs)]
        if own_top:
            parts.append(topk_standardised_l1(own, values))
        return torch.stack([part.sum() for part in parts])

    whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logps = (whole[0] @ whole[1][:vocab].t()).log_softmax(-1)
    all_ids = torch.cat([targets, ids], 1)
    dense = torch.where(all_ids < 0, 0.0, logps.gather(1, all_ids.clamp_min(0)))
    top = logps.topk(own_top, 1)
    dense = torch.cat([dense, top.values], 1)
    parts = hidden.clone().requires_grad_(), weight.chunk(world)[rank].clone().requires_grad_()
    found, top_ids = vocab_parallel_top(
        *parts, all_ids, own_top, vocab_size=vocab, group=group, chunk_bytes=chunk_bytes
    )
    result = {
        "log-probs": (found - dense).abs().max().item(),
        "ids": float((top_ids != top.indices).sum()),
    }
    for number, (ours, theirs) in enumerate(zip(losses(found), losses(dense), strict=True)):
        grads = torch.autograd.grad(ours, parts, retain_graph=True)
        expected = torch.autograd.grad(theirs, whole, retain_graph=True)
        dist.all_reduce(grads[0])
        shard = expected[1].chunk(world)[rank]
        result[f"loss {number}"] = (ours - theirs).abs().item()
        result[f"hidden {number}"] = (grads[0] - expected[0]).abs().max().item()
        result[f"weight {number}"] = (grads[1] - shard).abs().max().item()
    return result
