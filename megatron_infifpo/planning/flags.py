"""Flags of training that make a run what was planned."""

from collections.abc import Iterator

from megatron_infifpo.planning.estimate import Estimate, PlanningJob
from megatron_infifpo.planning.plan import FULL, NONE, SELECTIVE

RECOMPUTE = {
    NONE: "",
    SELECTIVE: "--recompute-granularity selective",
    FULL: "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
}


def training_flags(job: PlanningJob, one: Estimate) -> str:
    """Return the flags of `infifpo train` that make a run one of these estimates."""
    return " ".join(filter(None, _flags(job, one)))


def _flags(job: PlanningJob, one: Estimate) -> Iterator[str]:
    layout = one.layout
    for name, size in (
        ("tensor-model", layout.tensor),
        ("pipeline-model", layout.pipeline),
        ("context", layout.context),
    ):
        if size > 1:
            yield f"--{name}-parallel-size {size}"
    if layout.tensor > 1:
        yield "--sequence-parallel"
    yield RECOMPUTE[one.recompute]
    if job.grad_reduce_in_bf16:
        yield "--grad-reduce-in-bf16"
    if job.adam_moments == "bf16":
        yield "--use-precision-aware-optimizer --exp-avg-dtype bf16 --exp-avg-sq-dtype bf16"
    if job.optimizer_offload:
        yield "--use-precision-aware-optimizer --optimizer-cpu-offload"
        yield f"--optimizer-offload-fraction {job.optimizer_offload:g}"
    if job.seq_length is not None:
        yield f"--seq-length {job.seq_length}"
    yield f"--micro-batch-tokens {job.row_tokens}"
