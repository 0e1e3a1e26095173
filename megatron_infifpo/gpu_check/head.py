"""Group 3: the log-prob head against float64, and its time and memory beside full logits."""

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_infifpo.bench.head import FULL, LIGER, METHODS, OURS, SEVERAL, HeadJob, measure_head
from megatron_infifpo.bench.step import installed
from megatron_infifpo.gpu_check.records import MISSED, Options, Recorder, Result
from megatron_infifpo.logprobs import vocab_parallel_logprobs

# Logits in float32 are good to this many nats on a GPU, whatever the data type of the factors.
NATS = 1e-4
FACTOR = 2.0  # times what full logits err in the same data type
TIME, MEMORY = 1.2, 0.5  # times full logits': the limits on a GPU
PRECISE = {"rows": 512, "hidden": 1024, "vocabulary": 100_352}
PRECISE_CPU = {"rows": 96, "hidden": 128, "vocabulary": 4_099}
# Phi-4's head on four pairs of responses of 1,024 tokens.
TIMED = HeadJob(rows=8192, hidden=5120, vocabulary=100_352, response=1024, bf16=True, rounds=5)
TIMED_CPU = HeadJob(rows=256, hidden=64, vocabulary=2048, response=64, bf16=True, rounds=3)
KINDS = itertools.product(
    (torch.bfloat16, torch.float16, torch.float32), (None, torch.float32), (1, 5)
)  # of the factors; of the weight's gradient where Megatron keeps one; ids of a row
MORE_TIME = 1.1  # times that of one id a row, at 16 more


def check(options: Options, record: Recorder) -> None:
    """Check precision, then measure."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for dtype, main_grad, ids in KINDS:
        name = f"{_name(dtype)}, {_name(main_grad) if main_grad else 'no'} main_grad"
        name += f", {ids} ids" if ids > 1 else ""
        hidden, weight = Result(), Result()
        with record.check(f"{name}: log-probs", unit="nats") as logprobs:
            compare(options, dtype, main_grad, ids, logprobs, hidden, weight)
        record.result(f"{name}: gradient of rows", hidden, unit="relative")
        record.result(f"{name}: gradient of the weight", weight, unit="relative")
    beside_full_logits(options, record)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(
    options: Options,
    dtype: torch.dtype,
    main_grad: torch.dtype | None,
    ids: int,
    logprobs: Result,
    hidden_grad: Result,
    weight_grad: Result,
) -> None:
    """Compare the head in a data type, at so many ids a row, with float64 on the same numbers."""
    size = PRECISE if options.cuda else PRECISE_CPU
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(size["rows"], size["hidden"], generator=generator)
    weight = torch.randn(size["vocabulary"] + 64, size["hidden"], generator=generator)
    weight *= 2 * size["hidden"] ** -0.5  # logits of about 2
    targets = torch.randint(0, size["vocabulary"], (size["rows"], ids), generator=generator)
    upstream = torch.rand(size["rows"], ids, generator=generator)
    rows, table = hidden.to(options.device, dtype), weight.to(options.device, dtype)
    targets, upstream = targets.to(options.device), upstream.to(options.device)

    def full(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind, copy=True).requires_grad_() for x in (rows, table)]
        logits = leaves[0] @ leaves[1][: size["vocabulary"]].t()
        logits = logits.to(torch.promote_types(kind, torch.float32))
        values = logits.log_softmax(-1).gather(1, targets)
        return [values.detach(), *torch.autograd.grad(values, leaves, upstream.to(values.dtype))]

    exact, noisy = full(torch.float64), full(dtype)
    got = ours(rows, table, targets, upstream, size["vocabulary"], main_grad)
    largest = [1.0, *(float(x.abs().max()) for x in exact[1:])]
    least = [1e-6, torch.finfo(dtype).eps, torch.finfo(dtype).eps]
    found = zip((logprobs, hidden_grad, weight_grad), got, exact, noisy, strict=True)
    for (result, mine, best, plain), scale, floor in zip(found, largest, least, strict=True):
        result.value = float((mine - best).abs().max()) / scale
        result.limit = FACTOR * float((plain - best).abs().max()) / scale + floor
    if options.cuda:
        logprobs.limit = NATS


def ours(
    rows: Tensor,
    table: Tensor,
    targets: Tensor,
    upstream: Tensor,
    vocabulary: int,
    main_grad: torch.dtype | None,
) -> list[Tensor]:
    """Log-probs and both gradients from the head, in several chunks."""
    group = dist.group.WORLD
    assert group is not None
    hidden, weight = rows.clone().requires_grad_(), table.clone().requires_grad_()
    if main_grad is not None:
        weight.main_grad = torch.zeros_like(weight, dtype=main_grad)  # type: ignore[attr-defined]
    values = vocab_parallel_logprobs(
        hidden,
        weight,
        targets.squeeze(1),  # one id a row has a form of its own
        vocab_size=vocabulary,
        group=group,
        chunk_bytes=4 * vocabulary * (len(rows) // 5),
    )
    values = values.view_as(upstream)
    values.backward(upstream.to(values.dtype))
    assert hidden.grad is not None
    gradient = weight.grad if main_grad is None else weight.main_grad  # type: ignore[attr-defined]
    assert gradient is not None
    return [values.detach(), hidden.grad, gradient]


def beside_full_logits(options: Options, record: Recorder) -> None:
    """Time and memory of forward and backward, one method after the other."""
    job, found = TIMED if options.cuda else TIMED_CPU, {}
    for name in METHODS:
        if name == LIGER and not installed(LIGER):
            record.skip(f"{name}: time", "liger-kernel is not installed")
            continue
        with record.check(f"{name}: time", unit="s") as result:
            found[name] = measure_head(name, job)
            result.value = found[name]["seconds"]
            result.note = f"{job.rows} rows, {job.hidden} x {job.vocabulary}, bf16"
        if options.cuda:
            torch.cuda.empty_cache()
            if name in found:
                record.figure(f"{name}: memory", found[name]["mib"], "MiB")
    if FULL not in found or OURS not in found:
        return
    if SEVERAL in found:
        more = found[SEVERAL]["seconds"] / found[OURS]["seconds"]
        limit = Result(more, MORE_TIME if options.cuda else None)
        record.result("time beside one id a row", limit, unit="ratio", otherwise=MISSED)
    ratios = {key: found[OURS][key] / found[FULL][key] for key in ("seconds", "mib")}
    # A CPU is no place to hold the time of a GPU's shapes to a limit, and forgets no peak.
    time = Result(ratios["seconds"], TIME if options.cuda else None)
    record.result("time beside full logits", time, unit="ratio", otherwise=MISSED)
    if options.cuda:
        memory = Result(ratios["mib"], MEMORY)
        record.result("memory beside full logits", memory, unit="ratio")
