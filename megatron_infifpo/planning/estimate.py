"""Memory and hours of a run at every legal layout."""

from dataclasses import dataclass

from megatron_infifpo.families import tensor_parallel_sizes
from megatron_infifpo.planning.job import SAVINGS, PlanningJob
from megatron_infifpo.planning.layout import Layout, layouts
from megatron_infifpo.planning.plan import FLASH, GIB, Memory
from megatron_infifpo.planning.recompute import NONE, tried

# Left free for the allocator, NCCL and the CUDA context.
RESERVED = 6 * GIB
# Of a parameter whose optimizer state is on the host: its gradient comes as float32, it goes as
# bfloat16; Adam reads it, its gradient and both moments, and writes three of them, all in float32.
# Its copy in bfloat16 is made there.
LINK_BYTES = 4 + 2
ADAM_BYTES = 4 * (4 + 3) + 4 + 2


@dataclass(frozen=True)
class Hours:
    """Hours of a run, by what they go into.

    Attributes:
        computing: products of the forward and backward passes, nothing twice.
        recomputing: those that are computed again.
        exchanging: keys, values and rows of experts, from other ranks.
        updating: the optimizer's part on the host, and its way there and back.
        waiting: pipeline stages, for the first and the last row of a step.
    """

    computing: float
    recomputing: float
    exchanging: float
    updating: float
    waiting: float

    @property
    def total(self) -> float:
        """All of them."""
        passes = self.computing + self.recomputing + self.exchanging
        return passes + self.updating + self.waiting


@dataclass(frozen=True)
class Estimate:
    """What a run costs at a layout.

    Attributes:
        layout: of the ranks.
        recompute: what is computed again in the backward pass, a key of `recompute.FLAGS`.
        memory: of the fullest GPU.
        host: bytes of a node's memory that a save and the optimizer take.
        spent: hours of all training, by what they go into.
        fits: whether a GPU has that memory, and a node `host`.
    """

    layout: Layout
    recompute: str
    memory: Memory
    host: float
    spent: Hours
    fits: bool

    @property
    def hours(self) -> float:
        """Hours of all training."""
        return self.spent.total


def estimate(job: PlanningJob) -> list[Estimate]:
    """Estimate every legal layout, with what may be computed again; the best one comes first.

    Context parallelism is taken into account where `seq_length` is given. Under it training
    computes attention again, at least: each layer would keep keys of all ranks.
    """
    experts = job.plan.sizes.experts
    found = layouts(
        job.gpus,
        tensor_parallel_sizes(job.model),
        job.model["num_layers"],
        job.gpus_per_node,
        job.global_batch_size,
        contexts=job.seq_length is not None and job.traits.shares_prompts,
        experts=experts.count if experts else 1,
    )
    estimates = [
        estimate_at(job, layout, recompute)
        for layout in found
        for recompute in tried(layout, dense=experts is None)
    ]

    def order(one: Estimate) -> tuple:
        layout = one.layout
        ranks = layout.tensor * layout.pipeline * layout.context
        return not one.fits, one.hours, ranks, layout.tensor

    return sorted(estimates, key=order)


def best(estimates: list[Estimate], count: int = 3) -> list[Estimate]:
    """Return the fastest layouts that fit, each once, and then those with least memory.

    Args:
        estimates: as `estimate` returns them.
        count: of layouts.
    """
    fitting = [one for one in estimates if one.fits]
    others = [one for one in estimates if not one.fits]
    found: dict[Layout, Estimate] = {}
    for one in fitting + sorted(others, key=lambda one: one.memory.total):
        found.setdefault(one.layout, one)
    return list(found.values())[:count]


def estimate_at(job: PlanningJob, layout: Layout, recompute: str) -> Estimate:
    """Memory and hours at one layout, with `recompute` computed again."""
    plan, saving = job.plan, SAVINGS[job.optimizer_state]
    rows = _rows(job, layout)
    memory = plan.memory(
        layout,
        job.row_tokens,
        rows,
        gathered=job.longest.keys(layout.context),
        recompute=recompute,
        fused_adam=not job.torch_adam,
        saving=saving,
    )
    node = min(job.gpus, job.gpus_per_node)
    host = plan.host_memory(layout, saving, node, asynchronous=job.async_save)
    fits = memory.total + RESERVED <= job.gpu_memory * GIB and host <= job.host_memory * GIB
    return Estimate(layout, recompute, memory, host, _hours(job, layout, recompute, rows), fits)


def _rows(job: PlanningJob, layout: Layout) -> int:
    """Rows of a step on a data-parallel rank."""
    share = job.global_batch_size // layout.data
    tokens = job.global_batch_size * job.texts.tokens
    least = tokens / (job.row_tokens * layout.data)
    return next(n for n in range(1, share + 1) if share % n == 0 and n >= min(least, share))


def _hours(job: PlanningJob, layout: Layout, recompute: str, rows: int) -> Hours:
    """Hours of all training, in so many rows of a step on a rank."""
    texts, sft = job.texts, job.records
    tokens = sft * texts.length + job.pairs * texts.tokens
    attended = sft * texts.length**2 + job.pairs * texts.attended
    scored = (sft + job.responses * job.pairs) * texts.response
    rate = job.gpus * job.gpu_tflops * 1e12 * job.mfu * 3600

    def computing(again: str) -> float:
        length = attended / tokens
        return job.plan.operations(tokens, scored, length, recompute=again, attention=FLASH) / rate

    once, all_of_it = computing(NONE), computing(recompute)
    exchanged = job.plan.communication(layout, tokens / layout.data, recompute).total
    exchanging = exchanged / (job.gpu_bandwidth * 1e9 * 3600)
    # Pipeline stages wait for the first and the last row of a step.
    waiting = (all_of_it + exchanging) * (layout.pipeline - 1) / rows
    return Hours(once, all_of_it - once, exchanging, _updating(job), waiting)


def _updating(job: PlanningJob) -> float:
    """Hours in which the host updates its share of the optimizer, and GPUs wait for it.

    The way there, the update and the way back come one after the other.
    """
    share = job.optimizer_offload * job.plan.trained
    per_node = share * min(job.gpus, job.gpus_per_node) / job.gpus
    on_the_way = LINK_BYTES * share / job.gpus / (job.host_link * 1e9)
    adam = ADAM_BYTES * per_node / (job.host_bandwidth * 1e9)
    return job.steps * (on_the_way + adam) / 3600
