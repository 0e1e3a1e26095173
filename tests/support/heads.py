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
