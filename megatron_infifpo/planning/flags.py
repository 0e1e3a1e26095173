"""Flags of training that make a run what was planned."""

from collections.abc import Iterator

from megatron_infifpo.planning.estimate import Estimate
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.recompute import FLAGS as RECOMPUTE

PRECISION = {"bf16": "--bf16", "fp8": "--bf16 --fp8-format hybrid", "fp32": ""}
LAYERS = {"te": "--transformer-impl transformer_engine", "te-attention": "--te-attention"}
LAYERS |= {"local": "--transformer-impl local"}
SAVES = {
    "by-rank": "",
    "by-name": "--dist-ckpt-optim-fully-reshardable",
    "by-name-sparing": "--dist-ckpt-optim-fully-reshardable "
    "--distrib-optim-fully-reshardable-mem-efficient",
}


def training_flags(job: PlanningJob, one: Estimate) -> str:
    """Return the flags of `infifpo train` that make a run one of these estimates."""
    return " ".join(filter(None, _flags(job, one)))


def all_training_flags(job: PlanningJob, one: Estimate) -> tuple[str, ...]:
    """Return all of them, word by word, with those that are the same at every layout."""
    words = [
        PRECISION[job.precision],
        LAYERS[job.layers] if job.layers else "",
        "--use-distributed-optimizer",
        f"--global-batch-size {job.global_batch_size}",
        training_flags(job, one),
        "" if job.share_prompt else "--no-share-prompt",
        SAVES[job.optimizer_state],
        "--async-save --async-strategy mcore" if job.async_save else "",
    ]
    return tuple(" ".join(words).split())


def _flags(job: PlanningJob, one: Estimate) -> Iterator[str]:
    layout = one.layout
    for name, size in (
        ("tensor-model", layout.tensor),
        ("pipeline-model", layout.pipeline),
        ("context", layout.context),
        ("expert-model", layout.expert),
    ):
        if size > 1:
            yield f"--{name}-parallel-size {size}"
    if layout.tensor > 1:
        yield "--sequence-parallel"
        if job.plan.sizes.experts:
            yield "--expert-tensor-parallel-size 1"
    yield RECOMPUTE[one.recompute]
    if job.grad_reduce_in_bf16:
        yield "--grad-reduce-in-bf16"
    if job.precision_aware or job.adam_moments == "bf16" or job.optimizer_offload:
        yield "--use-precision-aware-optimizer"
    if job.adam_moments == "bf16":
        yield "--exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
    if job.optimizer_offload:
        yield f"--optimizer-cpu-offload --optimizer-offload-fraction {job.optimizer_offload:g}"
    if job.lora_rank is not None:
        yield f"--lora-rank {job.lora_rank}"
    if job.lora_targets:
        yield f"--lora-targets {' '.join(job.lora_targets)}"
    if job.seq_length is not None:
        yield f"--seq-length {job.seq_length}"
    yield f"--micro-batch-tokens {job.row_tokens}"
