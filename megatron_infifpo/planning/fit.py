"""The fastest way to train a model on so many GPUs: a layout, and what makes memory go further.

job = PlanningJob(megatron_args(read_hf_config("models/phi-4")), gpus=8)
found = fit(job)
found.layout, found.memory.total, found.hours, found.flags
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice
from megatron_infifpo.planning.estimate import RESERVED, Estimate, Hours, estimate, estimate_at
from megatron_infifpo.planning.flags import all_training_flags, training_flags
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.plan import GIB, Memory
from megatron_infifpo.planning.recompute import plain

# What may be taken: layers are computed again, Adam keeps 16 bits of a parameter in place of 32, a
# share of the optimizer is on the host; and Adam's moments are in bfloat16, which is less exact: of
# a second moment it cannot take away a thousandth, as Megatron's default --adam-beta2 0.999 does.
RECOMPUTE, AWARE, OFFLOAD, MOMENTS = "recompute", "precision-aware", "offload", "moments"
EXACT = (RECOMPUTE, AWARE, OFFLOAD)
MEASURES = (*EXACT, MOMENTS)
# Where nothing fits: rank of the adapters that are proposed, tokens of the shortest row.
LORA_RANK, SHORTEST = 16, 512
# Shares of the optimizer that are tried; Megatron moves whole parameters.
FRACTIONS = tuple(tenths / 10 for tenths in range(1, 11))


@dataclass(frozen=True)
class Measure:
    """What makes memory go further.

    Attributes:
        name: one of `MEASURES`.
        saves: bytes of the fullest GPU.
        costs: hours, at the same layout.
        without: hours of the fastest plan that does without it; None: there is none that fits.
    """

    name: str
    saves: float
    costs: float
    without: float | None


@dataclass(frozen=True)
class Fitted:
    """The fastest plan that fits.

    Attributes:
        job: what was asked, with what was chosen of the optimizer.
        estimate: of memory and hours.
        measures: that it takes.
    """

    job: PlanningJob
    estimate: Estimate
    measures: tuple[Measure, ...]

    @property
    def layout(self) -> Layout:
        """How the model is spread over ranks."""
        return self.estimate.layout

    @property
    def recompute(self) -> str:
        """What is computed again, a key of `recompute.FLAGS`."""
        return self.estimate.recompute

    @property
    def memory(self) -> Memory:
        """Bytes on the fullest GPU."""
        return self.estimate.memory

    @property
    def host(self) -> float:
        """Bytes of the fullest node's memory, beside its GPUs."""
        return self.estimate.host

    @property
    def hours(self) -> float:
        """Hours of all training."""
        return self.estimate.hours

    @property
    def spent(self) -> Hours:
        """Hours, by what they go into."""
        return self.estimate.spent

    @property
    def chosen_flags(self) -> tuple[str, ...]:
        """Flags of `infifpo train` for what was chosen, and the length of rows, word by word."""
        return tuple(training_flags(self.job, self.estimate).split())

    @property
    def flags(self) -> tuple[str, ...]:
        """All flags of `infifpo train` that make a run so, word by word."""
        return all_training_flags(self.job, self.estimate)


def fit(job: PlanningJob, *, measures: Collection[str] = EXACT) -> Fitted:
    """Find the fastest plan that fits the GPUs and the memory of the host.

    Tried are all legal layouts, with nothing, attention, MLPs or whole layers computed again, and
    with an optimizer as the job has it or, where the job leaves it as it is by default, a lighter
    one. Of plans that take as long, one that changes less is taken.

    Args:
        job: the model, the GPUs (how many: `gpus`), what is trained on.
        measures: of `MEASURES`, what may be taken.

    Raises:
        UserError: nothing fits, and what would; or a word that is no measure.
    """
    for name in measures:
        check_choice("measures", name, MEASURES)
    found = _fastest(job, measures)
    if found is None:
        raise UserError("\n".join([_too_large(job, measures), *_what_would_fit(job, measures)]))
    chosen, one = found
    return Fitted(chosen, one, tuple(_taken(job, chosen, one, measures)))


def _fastest(job: PlanningJob, measures: Collection[str]) -> tuple[PlanningJob, Estimate] | None:
    """Return the fastest plan that fits, with the optimizer that it takes; None: there is none."""
    fitting = [
        (one.hours, changes, place, lighter, one)
        for changes, lighter in enumerate(_optimizers(job, measures))
        for place, one in enumerate(estimate(lighter))
        if one.fits and (RECOMPUTE in measures or one.recompute == plain(one.layout))
    ]
    if not fitting:
        return None
    *_, lighter, one = min(fitting, key=lambda found: found[:3])
    return lighter, one


def _optimizers(job: PlanningJob, measures: Collection[str]) -> Iterator[PlanningJob]:
    """The job with optimizers that take less and less of a GPU, what changes least first.

    That of adapters is small as it is.
    """
    yield job
    light = job.precision_aware or job.adam_moments != "fp32" or job.optimizer_offload
    if light or job.torch_adam or job.precision == "fp32" or job.lora_rank is not None:
        return
    if AWARE in measures and job.precision == "bf16":
        yield replace(job, precision_aware=True)
    if OFFLOAD in measures:
        yield from (replace(job, optimizer_offload=share) for share in FRACTIONS)
    if MOMENTS in measures and job.precision == "bf16":
        yield replace(job, adam_moments="bf16")


def _taken(
    asked: PlanningJob, job: PlanningJob, one: Estimate, measures: Collection[str]
) -> Iterator[Measure]:
    """What a plan takes, each with what it saves and costs."""
    least = plain(one.layout)
    taken = {
        RECOMPUTE: one.recompute != least,
        AWARE: job.precision_aware != asked.precision_aware,
        OFFLOAD: job.optimizer_offload != asked.optimizer_offload,
        MOMENTS: job.adam_moments != asked.adam_moments,
    }
    for name in (name for name in MEASURES if taken[name]):
        other = (job, least) if name == RECOMPUTE else (asked, one.recompute)
        before = estimate_at(other[0], one.layout, other[1])
        instead = _fastest(asked, set(measures) - {name})
        yield Measure(
            name,
            before.memory.total - one.memory.total,
            one.hours - before.hours,
            instead[1].hours if instead else None,
        )


def _too_large(job: PlanningJob, measures: Collection[str]) -> str:
    """Say what does not fit."""
    machine = (
        f"{job.gpus} GPUs of {job.gpu_memory:g} GiB, with {job.host_memory:g} GiB of host memory "
        "a node"
    )
    found = [one for lighter in _optimizers(job, measures) for one in estimate(lighter)]
    if not found:
        return f"{machine}: there is no legal layout of this model. What would fit:"
    least = min(found, key=lambda one: one.memory.total)
    return (
        f"nothing fits {machine}: at the least a GPU needs {least.memory.total / GIB:.1f} GiB and "
        f"{RESERVED // GIB} more that are left free, and a node {least.host / GIB:.0f}. "
        "What would fit:"
    )


def _what_would_fit(job: PlanningJob, measures: Collection[str]) -> Iterator[str]:
    """Say what would fit: of each way the least that does."""
    ways = (_more_gpus(job), _adapters(job), _shorter(job), _gradients(job))
    tried = [[(text, other, measures) for text, other in way] for way in ways]
    if not set(measures) >= set(MEASURES):
        tried.append([(f"--measures {' '.join(MEASURES)}", job, MEASURES)])
    some = False
    for way in tried:
        for text, other, taken in way:
            found = _fastest(other, taken)
            if found is not None:
                memory, hours = found[1].memory.total / GIB, found[1].hours
                yield f"- {text}: {memory:.1f} GiB, {hours:.1f} hours"
                some = True
                break
    if not some:
        yield "- none of: more GPUs, --lora-rank, shorter rows, --grad-reduce-in-bf16"


def _more_gpus(job: PlanningJob) -> Iterator[tuple[str, PlanningJob]]:
    """Jobs of more and more GPUs, whole nodes beyond one."""
    for times in (2, 4, 8, 16, 32, 64):
        yield f"--fit {times * job.gpus}", replace(job, gpus=times * job.gpus)


def _adapters(job: PlanningJob) -> Iterator[tuple[str, PlanningJob]]:
    """Adapters in place of the whole model."""
    if job.lora_rank is None:
        yield f"--lora-rank {LORA_RANK}", replace(job, lora_rank=LORA_RANK)


def _shorter(job: PlanningJob) -> Iterator[tuple[str, PlanningJob]]:
    """Shorter and shorter rows, or texts where these make the row so long."""
    tokens, longest = job.row_tokens, job.seq_length
    while tokens > SHORTEST:
        tokens //= 2
        if longest is not None and tokens < job.longest.tokens:
            longest //= 2
            if longest < job.texts.length:
                return
            other = replace(job, seq_length=longest, micro_batch_tokens=tokens)
            yield f"--seq-length {longest}, shorter texts", other
        elif tokens >= job.texts.tokens:
            text = f"--micro-batch-tokens {tokens}, shorter rows"
            yield text, replace(job, micro_batch_tokens=tokens)


def _gradients(job: PlanningJob) -> Iterator[tuple[str, PlanningJob]]:
    """Gradients in bfloat16, which are less exact."""
    if not job.grad_reduce_in_bf16 and job.precision != "fp32":
        yield "--grad-reduce-in-bf16, less exact", replace(job, grad_reduce_in_bf16=True)
