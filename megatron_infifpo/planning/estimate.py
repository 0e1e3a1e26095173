"""Memory and hours of a run at every legal layout."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_infifpo.engine.kept import LAYERS, LayerTraits
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import tensor_parallel_sizes
from megatron_infifpo.flag_types import check_choice, check_number, check_positive, check_types
from megatron_infifpo.planning.plan import GIB, PRECISIONS, Layout, Memory, Plan, layouts
from megatron_infifpo.planning.saves import BY_NAME, BY_RANK, SPARING
from megatron_infifpo.rows.layout import RowLayout

# Left free for the allocator, NCCL and the CUDA context.
RESERVED = 6 * GIB
SAVINGS = {"by-rank": BY_RANK, "by-name": BY_NAME, "by-name-sparing": SPARING}


@dataclass(frozen=True)
class PlanningJob:
    """A run to plan; the defaults are the paper's, on H100s.

    Attributes:
        model: Megatron's arguments of its architecture, as `families.megatron_args` has them.
        gpus, gpus_per_node: how many.
        gpu_memory: GiB.
        gpu_tflops, mfu: a GPU's peak, and the share of it that training reaches.
        precision: a key of `PRECISIONS`.
        layers: a key of `kept.LAYERS`; None is the default of the precision.
        torch_adam: neither Transformer Engine's Adam nor apex's.
        optimizer_state: how it is saved, a key of `SAVINGS`.
        micro_batch_tokens: of a packed row.
        global_batch_size: pairs, or lists, of a step.
        pairs, sft_records, sft_epochs: what is trained on; one epoch of pairs, or lists.
        responses: of a list; 2 are a pair.
        share_prompt: a pair, or a list, has its prompt once.
        prompt_tokens, response_tokens: on average.
    """

    model: Mapping[str, Any]
    gpus: int
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    gpu_tflops: float = 989.0
    mfu: float = 0.35
    precision: str = "bf16"
    layers: str | None = None
    torch_adam: bool = False
    optimizer_state: str = "by-rank"
    micro_batch_tokens: int = 8192
    global_batch_size: int = 128
    pairs: int = 75_000
    sft_records: int = 75_000
    sft_epochs: int = 3
    responses: int = 2
    share_prompt: bool = True
    prompt_tokens: int = 400
    response_tokens: int = 600

    def __post_init__(self) -> None:
        """Refuse what no run can be.

        Raises:
            UserError: a value out of its range, or these layers cannot do that.
        """
        check_types(self)
        check_choice("precision", self.precision, PRECISIONS)
        if self.layers is not None:
            check_choice("layers", self.layers, LAYERS)
        check_choice("optimizer_state", self.optimizer_state, SAVINGS)
        least = {"sft_records": 0, "responses": 2}
        for name in (field.name for field in fields(self) if field.type is int):
            check_positive(self, name, least=least.get(name, 1))
        check_number(self, "gpu_memory", above=True)
        check_number(self, "gpu_tflops", above=True)
        check_number(self, "mfu", most=1.0, above=True)
        if self.share_prompt and not self.traits.shares_prompts:
            raise UserError(f"--layers {self.layers} cannot share prompts: pass --no-share-prompt")
        if self.layers == "local" and self.precision == "fp8":
            raise UserError("--precision fp8 needs Transformer Engine's layers, not --layers local")

    @property
    def traits(self) -> LayerTraits:
        """What is known of the layers."""
        return LAYERS[self.layers or ("local" if self.precision == "fp32" else "te")]

    @property
    def plan(self) -> Plan:
        """The model's cost."""
        return Plan(self.model, self.precision, self.traits.kept)


@dataclass(frozen=True)
class Estimate:
    """What a run costs at a layout.

    Attributes:
        layout: of the ranks.
        recompute: whether activations are computed again.
        memory: of the fullest GPU.
        host: bytes of a node's memory that a save takes.
        hours: of all training.
        fits: whether a GPU has that memory.
    """

    layout: Layout
    recompute: bool
    memory: Memory
    host: float
    hours: float
    fits: bool


def estimate(job: PlanningJob) -> list[Estimate]:
    """Estimate every legal layout, without recomputation and with it; the best one comes first."""
    found = layouts(
        job.gpus,
        tensor_parallel_sizes(job.model),
        job.model["num_layers"],
        job.gpus_per_node,
        job.global_batch_size,
    )
    estimates = [_at(job, layout, again) for layout in found for again in (False, True)]

    def order(one: Estimate) -> tuple:
        layout = one.layout
        return not one.fits, one.hours, layout.tensor * layout.pipeline, layout.tensor

    return sorted(estimates, key=order)


def _at(job: PlanningJob, layout: Layout, recompute: bool) -> Estimate:
    """Memory and hours at one layout."""
    plan, saving = job.plan, SAVINGS[job.optimizer_state]
    text = job.prompt_tokens + job.response_tokens
    row_layout = RowLayout(layout.tensor, share_prompt=job.share_prompt)
    count = job.responses
    pair = row_layout.pair_tokens(job.prompt_tokens, count * job.response_tokens, count)
    share = job.global_batch_size // layout.data
    least = job.global_batch_size * pair / (job.micro_batch_tokens * layout.data)
    rows = next(n for n in range(1, share + 1) if share % n == 0 and n >= min(least, share))
    # Pipeline stages wait for the first and the last row of a step.
    bubble = 1 + (layout.pipeline - 1) / rows
    sft = job.sft_records * job.sft_epochs
    tokens = sft * text + job.pairs * pair
    scored = (sft + count * job.pairs) * job.response_tokens
    memory = plan.memory(
        layout,
        max(job.micro_batch_tokens, pair),  # a row has whole ones
        rows,
        gathered=count * text / pair if job.share_prompt else 0.0,
        recompute=recompute,
        fused_adam=not job.torch_adam,
        saving=saving,
    )
    work = plan.operations(tokens, scored, text, recompute=recompute)
    return Estimate(
        layout,
        recompute,
        memory,
        host=plan.host_memory(layout, saving, min(job.gpus, job.gpus_per_node)),
        hours=work * bubble / (job.gpus * job.gpu_tflops * 1e12 * job.mfu) / 3600,
        fits=memory.total + RESERVED <= job.gpu_memory * GIB,
    )
