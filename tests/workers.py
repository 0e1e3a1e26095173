"""What forked ranks run in tests; every function returns something picklable."""

import sys
from typing import Any

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
    logprobs = vocab_parallel_logprobs(
        hidden, shard, targets, vocab_size=vocab, group=dist.group.WORLD, chunk_bytes=chunk_bytes
    )
    logprobs.backward(upstream.to(logprobs.dtype))
    dist.all_reduce(hidden.grad)
    return {
        "logprobs": logprobs.detach(),
        "hidden_grad": hidden.grad,
        "weight_grad": shard.grad,
    }


def train(argv: list[str]) -> dict[str, Any]:
    """Run `python -m megatron_infifpo.train ARGV` as one rank, and record what it computed.

    Returns the metrics of every step (on the last pipeline stage), gradient norms, evaluations.
    """
    import megatron.training.training as loop

    import megatron_infifpo.train as program

    record: dict[str, Any] = {"steps": [], "norms": []}
    original = loop.train_step

    def train_step(*args, **kwargs):
        result = original(*args, **kwargs)
        record["steps"].append({k: v.item() for k, v in result[0].items()})
        record["norms"].append(float(result[5]))
        return result

    loop.train_step = train_step
    sys.argv = ["train", *argv]
    program.main()
    return record
