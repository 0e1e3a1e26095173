"""Low-rank adapters on Megatron's linear layers, at any layout and of any kind.

A linear layer gets two parameters beside its weight: A, stacked for the Hugging Face layers that it
joins, and B, whose rows lie as its weight's. Of a column-parallel layer A is on every rank and B is
split with the weight; of a row-parallel one A is split and B is on every rank. Between both, what
has rank numbers a token goes over the ranks.
"""

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.lora import A, B, Lora, is_adapter, path_of
from megatron_infifpo.families.mapping import Entry, WeightMapping


class AdaptedLinear(torch.nn.Module):
    """What a linear layer with adapters has beyond the class that comes after this one.

    Attributes:
        lora: settings of all adapters.
        entry: of the weight in layer 0, for its shape and layout.
        adapted: whether the adapters take part; without them the layer is the pivot's.
    """

    lora: Lora
    entry: Entry
    adapted = True

    def __init__(self, *args: Any, config: Any, tp_group: Any = None, **options: Any):
        """Take the arguments of Megatron's and Transformer Engine's linear layers."""
        super().__init__(*args, config=config, tp_group=tp_group, **options)
        weight = self.weight
        assert isinstance(weight, Tensor)
        self.lora_group = get_tensor_model_parallel_group_if_none(tp_group)
        ranks = self.lora_group.size()
        self.by_rows = (
            weight.shape[0] != self.entry.shape[0]
        )  # column-parallel, in Megatron's words
        self.by_columns = ranks > 1 and not self.by_rows
        self.by_tokens = ranks > 1 and config.sequence_parallel
        for name, shape in self.lora.shapes(self.entry).items():
            axis, split = (1, self.by_columns) if name == A else (0, self.by_rows)
            local = [n // ranks if split and i == axis else n for i, n in enumerate(shape)]
            parameter = torch.nn.Parameter(
                torch.empty(local, dtype=config.params_dtype, device=weight.device)
            )
            set_tensor_model_parallel_attributes(parameter, split, axis, 1)
            # What is on every rank sees its rank's tokens alone: Megatron sums such gradients.
            parameter.sequence_parallel = self.by_tokens and not split  # type: ignore[attr-defined]
            self.register_parameter(name, parameter)
        self.register_buffer("lora_owners", self._owners(weight.device), persistent=False)
        if hasattr(self, "return_layernorm_output"):  # norm and product are one module
            self.return_layernorm_output = True

    def _owners(self, device: torch.device) -> Tensor | None:
        """Which adapter a row of B belongs to, one-hot `[rows, n]`; None where there is just one.

        Rows of a layer without an adapter belong to none: they start at 0 and have no gradient.
        """
        places, shapes = self.lora.places(self.entry.row), self.entry.hf_shapes
        if len(shapes) == 1:
            return None
        parts = [torch.full((shape[0], 1), i) for i, shape in enumerate(shapes)]
        owners = self.entry.to_megatron(parts).squeeze(1)
        if self.by_rows:
            rank, ranks = self.lora_group.rank(), self.lora_group.size()
            halves = owners.chunk(2 if self._gated else 1)
            owners = torch.cat([half.chunk(ranks)[rank] for half in halves])
        return (owners[:, None] == torch.tensor(places)).to(device)

    @property
    def _gated(self) -> bool:
        """Whether Megatron splits both halves of the weight over ranks, a gate and what it lets."""
        return self.entry.row.shape[0] == "gate_up"

    def forward(self, inputs: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        """Return what the layer does, plus the adapters' part; and its bias where it has one."""
        output, bias = super().forward(inputs, *args, **options)
        if isinstance(output, tuple):
            output, inputs = output  # the norm's output is what was multiplied
        return (output + self._delta(inputs) if self.adapted else output), bias

    def _delta(self, inputs: Tensor) -> Tensor:
        """The adapters' part of the output, of `[T, 1, in]` as the layer takes it."""
        small = F.linear(inputs, self.lora_a)  # type: ignore[arg-type]
        if self.by_rows:
            into = copy_to_tensor_model_parallel_region
            into = gather_from_sequence_parallel_region if self.by_tokens else into
            small = into(small, group=self.lora_group)
        elif self.by_columns:
            out_of = reduce_from_tensor_model_parallel_region
            out_of = reduce_scatter_to_sequence_parallel_region if self.by_tokens else out_of
            small = out_of(small, group=self.lora_group)
        b: Tensor = self.lora_b  # type: ignore[assignment]
        if self.lora_owners is not None:  # each row takes the products with its own A
            b = (b[:, None, :] * self.lora_owners[:, :, None]).flatten(1)  # type: ignore[index]
        return F.linear(small, b) * self.lora.scale

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> ShardedStateDict:
        """Say which part of which tensor every parameter is, adapters as their weight."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state: ShardedStateDict = super().sharded_state_dict(  # type: ignore[misc]
            prefix, sharded_offsets, metadata
        )
        groups = {"tp_group": self.lora_group, "dp_cp_group": metadata["dp_cp_group"]}
        own = make_sharded_tensors_for_checkpoint(
            {A: self.lora_a, B: self.lora_b},
            prefix,
            {B: 0} if self.by_rows else {A: 1},
            sharded_offsets,
            **groups,
        )
        if self._gated:
            own[f"{prefix}{B}"] = apply_swiglu_sharded_factory(
                own[f"{prefix}{B}"],
                sharded_offsets,
                metadata.get("singleton_local_shards", False),
                tp_group=self.lora_group,
                dp_group=metadata["dp_cp_group"],
            )
        return state | own

    @torch.no_grad()
    def draw(self, seed: int, layer: int) -> None:
        """Let A be what PEFT begins with, and B 0: the same at every layout.

        Args:
            seed: of the run.
            layer: number of the layer in the whole model, from 0.
        """
        names = [self.entry.row.hf_names[place] for place in self.lora.places(self.entry.row)]
        whole = (self.lora.rank, self.entry.shape[1])
        drawn = torch.cat([_drawn(whole, seed, name.format(layer)) for name in names])
        if self.by_columns:
            drawn = drawn.chunk(self.lora_group.size(), dim=1)[self.lora_group.rank()]
        self.lora_a.copy_(drawn)  # type: ignore[operator]
        self.lora_b.zero_()  # type: ignore[operator]


def _drawn(shape: tuple[int, int], seed: int, name: str) -> Tensor:
    """Draw an A `[rank, in]`: uniform with PEFT's bound, that of kaiming_uniform_(a=sqrt(5))."""
    words = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(words[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def adapt_layer(layer: ModuleSpec, lora: Lora, mapping: WeightMapping) -> ModuleSpec:
    """Give the linear layers of a GPT layer spec their adapters, in place; before the family does.

    Args:
        layer: of any kind of layers.
        lora: which of them have some.
        mapping: of the model's tensors.
    """
    for row in lora.rows(mapping):
        part, name = path_of(row).split(".")
        if part == "mlp":  # of a layer without experts
            modules = layer.submodules.mlp.keywords["submodules"]
        else:
            modules = getattr(layer.submodules, part).submodules
        linear = getattr(modules, name)
        own = {"lora": lora, "entry": mapping.entry(row.key, 0)}
        setattr(modules, name, type(f"Adapted{linear.__name__}", (AdaptedLinear, linear), own))
    return layer


def train_adapters(models: list[Any], seed: int) -> list[Any]:
    """Hook of Megatron's model builder: let adapters be all that is trained and saved.

    Args:
        models: this rank's GPTModel chunks, not wrapped, with `adapt_layer`'s layers and the base's
            weights.
        seed: of the run.

    Raises:
        UserError: this rank's pipeline stage has nothing to train.
    """
    if not any(True for _ in _adapted(models)):
        raise UserError(
            "a pipeline stage has no layers, and so no adapters to train: leave out what splits "
            "the stages unevenly, or train without --lora-rank"
        )
    for model in models:
        model.requires_grad_(False)
        for layer in model.decoder.layers:
            for linear in _adapted([layer]):
                linear.draw(seed, layer.layer_number - 1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if model.pre_process:
            model.embedding.register_forward_hook(_with_gradient)
        _save_adapters_alone(model)
    return models


def _with_gradient(_: torch.nn.Module, __: Any, embedded: Tensor) -> None:
    """Let the embedding's output have a gradient: else layers that run again would have none."""
    if torch.is_grad_enabled() and not embedded.requires_grad:
        embedded.requires_grad_()


def _save_adapters_alone(model: Any) -> None:
    """Let a chunk's checkpoints hold adapters alone, and loading one leave the rest as it is."""
    whole = model.sharded_state_dict

    def adapters(*args: Any, **options: Any) -> ShardedStateDict:
        return {k: v for k, v in whole(*args, **options).items() if is_adapter(k)}

    def keep(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, value in module.state_dict().items():
            state.setdefault(prefix + name, value)

    model.sharded_state_dict = adapters
    model.register_load_state_dict_pre_hook(keep)


@contextlib.contextmanager
def adapters_off(models: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Run the pivot that adapters are added to, inside; models may be wrapped."""
    linears = list(_adapted(models))
    for linear in linears:
        linear.adapted = False
    try:
        yield
    finally:
        for linear in linears:
            linear.adapted = True


def _adapted(modules: Sequence[torch.nn.Module]) -> Iterator[AdaptedLinear]:
    return (m for module in modules for m in module.modules() if isinstance(m, AdaptedLinear))
