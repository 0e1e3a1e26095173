#!/usr/bin/env python
"""Compare the log-prob head with full logits: time and memory of forward and backward.

    python tools/benchmark_head.py --hidden 5120 --vocabulary 100352 --rows 4096

One product of rows and output weight gives the logits, two the gradients; the head computes the
first again in the backward pass, so four products to three are the floor of its time. Liger's fused
DPO loss, where it is installed, has the rows as pairs of --response rows each; it takes a pair at
a time and makes its gradients at once. Memory is counted beyond what all methods need: rows,
weight, and their gradients, the weight's in float32 as Megatron keeps it.
"""

import argparse
import importlib.util
import json
import os
import time

import torch
import torch.distributed as dist

from megatron_infifpo.bench import alternate, on_gpu, peak_mib, table
from megatron_infifpo.cli import UserError, positive, run
from megatron_infifpo.logprobs import vocab_parallel_logprobs

FULL, OURS, LIGER = METHODS = ("full logits", "this head", "Liger")


def main() -> None:
    """Run every method in turn and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=positive, default=5120, help="(default: 5120, Phi-4)")
    parser.add_argument("--vocabulary", type=positive, default=100352, help="(default: 100352)")
    parser.add_argument("--rows", type=positive, default=4096, help="(default: 4096)")
    parser.add_argument("--response", type=positive, default=256, help="(default: 256)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--bf16", action="store_true", help="(default: float32)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return
    if args.rows % (2 * args.response):
        raise UserError(f"--rows {args.rows}: expected pairs of {args.response} rows each")
    print(
        f"{args.rows} rows, hidden {args.hidden}, vocabulary {args.vocabulary}, "
        f"{'bfloat16' if args.bf16 else 'float32'}, medians of {args.rounds}"
    )
    methods = METHODS if importlib.util.find_spec("liger_kernel") else (FULL, OURS)
    table(alternate(methods, args.rounds), FULL, {"mean log-prob": "mean"})


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Time one forward and backward; memory beyond the tensors that every method needs."""
    torch.set_num_threads(args.threads)
    device = "cuda" if on_gpu() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(0.05).requires_grad_()

    hidden, weight = random(args.rows, args.hidden), random(args.vocabulary, args.hidden)
    targets = torch.randint(0, args.vocabulary, (args.rows,), generator=generator, device=device)
    # As Megatron trains: gradients are collected in float32 buffers.
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    hidden.grad = torch.zeros_like(hidden)
    for tensor in (weight.main_grad, hidden.grad):  # type: ignore[attr-defined]
        tensor.fill_(1.0).zero_()  # touched, so that it counts in what is there before
    if on_gpu():  # load the kernels first
        (hidden[:8].detach() @ weight.detach().t()).float().logsumexp(-1).sum().item()
        torch.cuda.reset_peak_memory_stats()
    before, start = peak_mib(), time.perf_counter()
    if args.only == FULL:
        logits = (hidden @ weight.t()).float()
        logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        logprobs.sum().backward()
        weight.main_grad += weight.grad  # type: ignore[attr-defined, operator]
    elif args.only == OURS:
        logprobs = vocab_parallel_logprobs(
            hidden, weight, targets, vocab_size=args.vocabulary, group=dist.group.WORLD
        )
        logprobs.sum().backward()
    else:
        logprobs = liger_logprobs(hidden, weight, targets, args.response)
        weight.main_grad += weight.grad  # type: ignore[attr-defined, operator]
    if on_gpu():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    mean = logprobs.detach().double().mean().item()
    return {"seconds": seconds, "mib": max(1.0, peak_mib() - before), "mean": mean}


def liger_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, length: int
) -> torch.Tensor:
    """Forward and backward of Liger's loss on responses of so many rows; their mean log-probs."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=on_gpu(), average_log_prob=True)
    loss, report = fused(weight, hidden.view(-1, length, hidden.shape[1]), targets.view(-1, length))
    loss.backward()
    return torch.cat([report[0], report[1]])


if __name__ == "__main__":
    run(main)
