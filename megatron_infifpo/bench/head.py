"""From hidden rows to log-probs and gradients: full logits, this program's head, Liger's loss.

The head also at several ids a row, as soft targets have them, and at the most probable ones.

Memory is counted beyond what all methods need: rows, weight, and their gradients, the weight's in
float32 as Megatron keeps it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_infifpo.bench.jobs import on_gpu, peak_mib
from megatron_infifpo.logprobs import vocab_parallel_logprobs, vocab_parallel_top

Method = Callable[[Tensor, Tensor, Tensor, int], Tensor]

FULL, OURS, SEVERAL, OWN, LIGER = METHODS = (
    "full logits", "this head", "at 16 more ids", "and its top 10", "Liger",
)  # fmt: skip
MORE_IDS, OWN_TOP = 16, 10


@dataclass(frozen=True)
class HeadJob:
    """What is measured.

    Attributes:
        rows, hidden, vocabulary: sizes.
        response: rows of a response, two of which are a pair of Liger's loss.
        bf16: rows and weight in bfloat16, else in float32.
        rounds: timed, after a first one where there are more than one.
    """

    rows: int
    hidden: int
    vocabulary: int
    response: int
    bf16: bool
    rounds: int = 1


def measure_head(name: str, job: HeadJob) -> dict[str, float]:
    """Time forward and backward of one of `METHODS`; a process measures memory of one only.

    Returns:
        seconds, mib beyond what all methods need, and the mean log-prob.
    """
    device = "cuda" if on_gpu() else "cpu"
    dtype = torch.bfloat16 if job.bf16 else torch.float32
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device, dtype=dtype)
        return values.mul_(0.05).requires_grad_()

    hidden, weight = random(job.rows, job.hidden), random(job.vocabulary, job.hidden)
    targets = torch.randint(0, job.vocabulary, (job.rows,), generator=generator, device=device)
    # As Megatron trains: gradients are collected in float32 buffers.
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    hidden.grad = torch.zeros_like(hidden)
    for tensor in (weight.main_grad, hidden.grad):  # type: ignore[attr-defined]
        tensor.fill_(1.0).zero_()  # touched, so that it counts in what is there before
    more = torch.randint(
        0, job.vocabulary, (job.rows, MORE_IDS), generator=generator, device=device
    )
    methods: dict[str, Method] = {
        FULL: _full,
        OURS: _ours,
        SEVERAL: partial(_several, more_ids=more, own_top=0),
        OWN: partial(_several, more_ids=more[:, :0], own_top=OWN_TOP),
        LIGER: _liger,
    }
    method = methods[name]
    if on_gpu():  # load the kernels first
        (hidden[:8].detach() @ weight.detach().t()).float().logsumexp(-1).sum().item()
        torch.cuda.reset_peak_memory_stats()
    before, times = peak_mib(), []
    for _ in range(job.rounds):
        start = time.perf_counter()
        logprobs = method(hidden, weight, targets, job.response)
        weight.grad = None
        if on_gpu():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    mean = logprobs.detach().double().mean().item()
    seconds = statistics.median(times[1:] or times)
    return {"seconds": seconds, "mib": max(1.0, peak_mib() - before), "mean": mean}


def _full(hidden: Tensor, weight: Tensor, targets: Tensor, _: int) -> Tensor:
    logits = (hidden @ weight.t()).float()
    logprobs = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    logprobs.sum().backward()
    weight.main_grad += weight.grad  # type: ignore[attr-defined]
    return logprobs


def _ours(hidden: Tensor, weight: Tensor, targets: Tensor, _: int) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    logprobs = vocab_parallel_logprobs(hidden, weight, targets, vocab_size=len(weight), group=group)
    logprobs.sum().backward()
    return logprobs


def _several(
    hidden: Tensor, weight: Tensor, targets: Tensor, _: int, *, more_ids: Tensor, own_top: int
) -> Tensor:
    """Log-probs of the targets, with the gradient of those at more ids."""
    group = dist.group.WORLD
    assert group is not None
    ids = torch.cat([targets[:, None], more_ids], dim=1)
    found = vocab_parallel_top(
        hidden, weight, ids, own_top, vocab_size=len(weight), group=group
    ).logprobs
    found.sum().backward()
    return found[:, 0]


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, length: int) -> Tensor:
    """Liger's loss on responses of so many rows; their mean log-probs."""
    from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(use_ref_model=False, compiled=on_gpu(), average_log_prob=True)
    loss, report = fused(weight, hidden.view(-1, length, hidden.shape[1]), targets.view(-1, length))
    loss.backward()
    weight.main_grad += weight.grad  # type: ignore[attr-defined]
    return torch.cat([report[0], report[1]])
