"""Memory and hours of a run at every legal layout."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron_infifpo.engine.kept import LAYERS, LayerTraits
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import tensor_parallel_sizes
from megatron_infifpo.flag_types import check_choice, check_number, check_positive, check_types
from megatron_infifpo.planning.plan import (
    FLASH,
    FULL,
    GIB,
    NONE,
    SELECTIVE,
    Layout,
    Memory,
    Plan,
    layouts,
)
from megatron_infifpo.planning.precision import PRECISIONS
from megatron_infifpo.planning.saves import BY_NAME, BY_RANK, SPARING
from megatron_infifpo.planning.texts import Texts

# Left free for the allocator, NCCL and the CUDA context.
RESERVED = 6 * GIB
SAVINGS = {"by-rank": BY_RANK, "by-name": BY_NAME, "by-name-sparing": SPARING}
MOMENTS = ("fp32", "bf16")


@dataclass(frozen=True)
class PlanningJob:
    """A run to plan; the defaults are the paper's, on H100s.

    Attributes:
        model: Megatron's arguments of its architecture, as `families.megatron_args` has them.
        gpus, gpus_per_node: how many.
        gpu_memory: GiB.
        gpu_tflops, mfu: a GPU's peak, and the share of it that training reaches.
        gpu_bandwidth: GB/s at which a GPU gathers what other ranks of its row have.
        precision: a key of `PRECISIONS`.
        layers: a key of `kept.LAYERS`; None is the default of the precision.
        torch_adam: neither Transformer Engine's Adam nor apex's.
        grad_reduce_in_bf16: gradients are kept in bfloat16.
        adam_moments: how Adam's two moments are kept, one of `MOMENTS`.
        optimizer_offload: share of the optimizer that is in host memory.
        optimizer_state: how it is saved, a key of `SAVINGS`.
        micro_batch_tokens: of a packed row.
        global_batch_size: pairs, or lists, of a step.
        pairs, sft_records, sft_epochs: what is trained on; one epoch of pairs, or lists.
        responses: of a list; 2 are a pair.
        share_prompt: a pair, or a list, has its prompt once.
        seq_length: of the longest text that must fit, a prompt with one response; its pair, of the
            average proportions, is then a row at least, and ranks may share a row.
        prompt_tokens, response_tokens: on average. None: 400 and 600, as the paper's; with
            `seq_length` 7/32 and 1/32 of that.
    """

    model: Mapping[str, Any]
    gpus: int
    gpus_per_node: int = 8
    gpu_memory: float = 80.0
    gpu_tflops: float = 989.0
    mfu: float = 0.35
    gpu_bandwidth: float = 350.0
    precision: str = "bf16"
    layers: str | None = None
    torch_adam: bool = False
    grad_reduce_in_bf16: bool = False
    adam_moments: str = "fp32"
    optimizer_offload: float = 0.0
    optimizer_state: str = "by-rank"
    micro_batch_tokens: int = 8192
    global_batch_size: int = 128
    pairs: int = 75_000
    sft_records: int = 75_000
    sft_epochs: int = 3
    responses: int = 2
    share_prompt: bool = True
    seq_length: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None

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
        check_choice("adam_moments", self.adam_moments, MOMENTS)
        least = {"sft_records": 0, "responses": 2}
        for name in (field.name for field in fields(self) if field.type in (int, int | None)):
            check_positive(self, name, least=least.get(name, 1))
        for name in ("gpu_memory", "gpu_tflops", "gpu_bandwidth"):
            check_number(self, name, above=True)
        check_number(self, "mfu", most=1.0, above=True)
        check_number(self, "optimizer_offload", most=1.0)
        self._check_together()

    def _check_together(self) -> None:
        """Refuse fields that contradict each other."""
        if self.share_prompt and not self.traits.shares_prompts:
            raise UserError(f"--layers {self.layers} cannot share prompts: pass --no-share-prompt")
        if self.layers == "local" and self.precision == "fp8":
            raise UserError("--precision fp8 needs Transformer Engine's layers, not --layers local")
        if self.grad_reduce_in_bf16 and self.precision == "fp32":
            raise UserError("--grad-reduce-in-bf16 has no effect with --precision fp32")
        if self.adam_moments != "fp32" and (self.torch_adam or self.precision != "bf16"):
            raise UserError(
                f"--adam-moments {self.adam_moments} needs Transformer Engine's Adam and "
                "--precision bf16"
            )
        if self.optimizer_offload and (self.torch_adam or self.precision == "fp32"):
            raise UserError("--optimizer-offload needs Transformer Engine, and no float32")
        if self.optimizer_offload and self.adam_moments != "fp32":
            raise UserError("--adam-moments has no effect with --optimizer-offload: leave one out")
        if self.seq_length is not None and self.texts.length > self.seq_length:
            raise UserError(
                f"texts have {self.texts.length} tokens on average (--prompt-tokens, "
                f"--response-tokens), more than --seq-length {self.seq_length}"
            )

    @property
    def traits(self) -> LayerTraits:
        """What is known of the layers."""
        return LAYERS[self.layers or ("local" if self.precision == "fp32" else "te")]

    @property
    def plan(self) -> Plan:
        """The model's cost."""
        return Plan(
            self.model,
            self.precision,
            self.traits.kept,
            gradients=self.grad_reduce_in_bf16,
            moments=self.adam_moments == "bf16",
            offload=self.optimizer_offload,
        )

    @property
    def texts(self) -> Texts:
        """A pair, or list, of average lengths."""
        prompt, response = 400, 600
        if self.seq_length is not None:
            prompt, response = (max(1, part * self.seq_length // 32) for part in (7, 1))
        return Texts(
            prompt if self.prompt_tokens is None else self.prompt_tokens,
            response if self.response_tokens is None else self.response_tokens,
            self.responses,
            self.share_prompt,
        )

    @property
    def longest(self) -> Texts:
        """A pair, or list, that must fit."""
        return self.texts if self.seq_length is None else self.texts.scaled(self.seq_length)

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, which has whole pairs."""
        return max(self.micro_batch_tokens, self.longest.tokens)


@dataclass(frozen=True)
class Estimate:
    """What a run costs at a layout.

    Attributes:
        layout: of the ranks.
        recompute: what is computed again in the backward pass: NONE, SELECTIVE or FULL.
        memory: of the fullest GPU.
        host: bytes of a node's memory that a save and the optimizer take.
        hours: of all training.
        fits: whether a GPU has that memory.
    """

    layout: Layout
    recompute: str
    memory: Memory
    host: float
    hours: float
    fits: bool


def estimate(job: PlanningJob) -> list[Estimate]:
    """Estimate every legal layout, with what may be computed again; the best one comes first.

    Context parallelism is taken into account where `seq_length` is given. Under it training
    computes attention again, at least: each layer would keep keys of all ranks. Elsewhere that
    would save nothing, since a fused kernel keeps its inputs and its output only.
    """
    found = layouts(
        job.gpus,
        tensor_parallel_sizes(job.model),
        job.model["num_layers"],
        job.gpus_per_node,
        job.global_batch_size,
        contexts=job.seq_length is not None and job.traits.shares_prompts,
    )
    estimates = [
        _at(job, layout, recompute)
        for layout in found
        for recompute in (NONE if layout.context == 1 else SELECTIVE, FULL)
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


def _at(job: PlanningJob, layout: Layout, recompute: str) -> Estimate:
    """Memory and hours at one layout."""
    plan, saving, texts = job.plan, SAVINGS[job.optimizer_state], job.texts
    share = job.global_batch_size // layout.data
    least = job.global_batch_size * texts.tokens / (job.row_tokens * layout.data)
    rows = next(n for n in range(1, share + 1) if share % n == 0 and n >= min(least, share))
    # Pipeline stages wait for the first and the last row of a step.
    bubble = 1 + (layout.pipeline - 1) / rows
    sft = job.sft_records * job.sft_epochs
    tokens = sft * texts.length + job.pairs * texts.tokens
    attended = sft * texts.length**2 + job.pairs * texts.attended
    scored = (sft + job.responses * job.pairs) * texts.response
    memory = plan.memory(
        layout,
        job.row_tokens,
        rows,
        gathered=job.longest.keys(layout.context),
        recompute=recompute,
        fused_adam=not job.torch_adam,
        saving=saving,
    )
    work = plan.operations(
        tokens, scored, attended / tokens, recompute=recompute, attention=FLASH
    ) / (job.gpus * job.gpu_tflops * 1e12 * job.mfu)
    gathering = plan.communication(layout, tokens / layout.data, recompute)
    return Estimate(
        layout,
        recompute,
        memory,
        host=plan.host_memory(layout, saving, min(job.gpus, job.gpus_per_node)),
        hours=(work + gathering / (job.gpu_bandwidth * 1e9)) * bubble / 3600,
        fits=memory.total + RESERVED <= job.gpu_memory * GIB,
    )
