"""A run that is planned: the model, the machine, what is trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from megatron_infifpo.engine.kept import LAYERS, LayerTraits
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_number, check_positive, check_types
from megatron_infifpo.planning.adapters import Adapters
from megatron_infifpo.planning.plan import Plan
from megatron_infifpo.planning.precision import PRECISIONS
from megatron_infifpo.planning.saves import BY_NAME, BY_RANK, SPARING
from megatron_infifpo.planning.texts import Texts

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
        gpu_bandwidth: GB/s at which a GPU gets what others of its node have.
        host_memory: GiB of a node, beside its GPUs.
        host_bandwidth: GB/s at which a node's processors read and write its memory, all together.
        host_link: GB/s between a GPU and the host, either way, while all of a node's GPUs do so.
        precision: a key of `PRECISIONS`.
        layers: a key of `kept.LAYERS`; None is the default of the precision.
        torch_adam: neither Transformer Engine's Adam nor apex's.
        grad_reduce_in_bf16: gradients are kept in bfloat16.
        precision_aware: Transformer Engine's Adam keeps 16 bits of a parameter beside bfloat16's.
        adam_moments: how Adam's two moments are kept, one of `MOMENTS`.
        optimizer_offload: share of the optimizer that is in host memory.
        optimizer_state: how it is saved, a key of `SAVINGS`.
        async_save: a process of its own writes checkpoints.
        lora_rank: of adapters, which alone are trained then; None: all of the model is.
        lora_targets: linear layers that have adapters, as Hugging Face files name them; none: all.
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
    host_memory: float = 1800.0
    host_bandwidth: float = 200.0
    host_link: float = 25.0
    precision: str = "bf16"
    layers: str | None = None
    torch_adam: bool = False
    grad_reduce_in_bf16: bool = False
    precision_aware: bool = False
    adam_moments: str = "fp32"
    optimizer_offload: float = 0.0
    optimizer_state: str = "by-rank"
    async_save: bool = False
    lora_rank: int | None = None
    lora_targets: Sequence[str] = ()
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
        for name in (
            "gpu_memory", "gpu_tflops", "gpu_bandwidth", "host_memory", "host_bandwidth",
            "host_link",
        ):  # fmt: skip
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
        bits = "--precision-aware" if self.precision_aware else "--adam-moments bf16"
        aware = self.precision_aware or self.adam_moments != "fp32"
        if aware and (self.torch_adam or self.precision != "bf16"):
            raise UserError(f"{bits} needs Transformer Engine's Adam and --precision bf16")
        if self.optimizer_offload and (self.torch_adam or self.precision == "fp32"):
            raise UserError("--optimizer-offload needs Transformer Engine, and no float32")
        if self.optimizer_offload and aware:
            name = bits.split()[0]
            raise UserError(f"{name} has no effect with --optimizer-offload: leave one out")
        if self.lora_targets and self.lora_rank is None:
            raise UserError("--lora-targets has no effect without --lora-rank")
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
    def adapters(self) -> Adapters | None:
        """What is trained where the model is frozen."""
        if self.lora_rank is None:
            return None
        return Adapters.of(self.model, self.lora_rank, self.lora_targets)

    @cached_property
    def plan(self) -> Plan:
        """The model's cost."""
        return Plan(
            self.model,
            self.precision,
            self.traits.kept,
            self.adapters,
            gradients=self.grad_reduce_in_bf16,
            aware=self.precision_aware,
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
    def records(self) -> int:
        """Texts that are trained on by themselves, in all epochs of SFT."""
        return self.sft_records * self.sft_epochs

    @property
    def steps(self) -> float:
        """Steps of all training."""
        return (self.records + self.pairs) / self.global_batch_size

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, which has whole pairs."""
        return max(self.micro_batch_tokens, self.longest.tokens)
