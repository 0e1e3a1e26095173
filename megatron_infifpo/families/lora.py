"""Low-rank adapters of a model: which tensors have them, and how they lie in Megatron's tensors.

An adapter belongs to a Hugging Face linear layer, as PEFT has it: its weight W becomes
W + alpha / rank * B A (LoRA, arXiv 2106.09685). Megatron joins some of these layers into one. There
the A of all are stacked, and the rows of B lie as the rows of the weight do, so that each of them
trains as PEFT's, and what a family's rows say about weights says all about adapters too.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.mapping import LAYER_PREFIX, Entry, Row, WeightMapping

A, B = "lora_a", "lora_b"  # what Megatron's linear layers, and checkpoints, call them
ALL_LINEAR = "all-linear"


class Factors(NamedTuple):
    """The adapter of one Hugging Face linear layer."""

    name: str
    """The layer's name, with those of all modules around it, as weights of it are called."""
    a: Tensor
    """`[rank, in]`."""
    b: Tensor
    """`[out, rank]`."""


@dataclass(frozen=True)
class Lora:
    """The adapters of a run.

    Attributes:
        rank: columns of B.
        alpha: B A is scaled by alpha / rank.
        targets: Hugging Face's names of the linear layers that have one, sorted, such as q_proj.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / self.rank

    def rows(self, mapping: WeightMapping) -> Iterator[Row]:
        """Rows of the Megatron tensors that have adapters."""
        return filter(self.has, mapping.rows.values())

    def has(self, row: Row) -> bool:
        """Whether a Megatron tensor has adapters."""
        return is_linear(row) and bool(self.places(row))

    def places(self, row: Row) -> list[int]:
        """Which of a row's Hugging Face tensors have one."""
        return [i for i, name in enumerate(row.hf_names) if module_name(name) in self.targets]

    def shapes(self, entry: Entry) -> dict[str, tuple[int, int]]:
        """Shapes of a Megatron tensor's adapters, by name: stacked A, and B in its layout."""
        out, inside = entry.shape
        return {A: (len(self.places(entry.row)) * self.rank, inside), B: (out, self.rank)}

    def factors(self, entry: Entry, a: Tensor, b: Tensor) -> Iterator[tuple[int, Factors]]:
        """Split the adapters of a Megatron tensor into those of Hugging Face's layers.

        Args:
            entry: of the tensor.
            a: stacked, `[n * rank, in]`.
            b: in the tensor's layout, `[out, rank]`.

        Yields:
            The place of the layer among the entry's tensors, and its adapter.
        """
        places, parts = self.places(entry.row), entry.to_hf(b)
        for place, own in zip(places, a.chunk(len(places)), strict=True):
            name = entry.hf_names[place].removesuffix(".weight")
            yield place, Factors(name, own, parts[place])

    def merge(self, entry: Entry, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return a Megatron weight with its adapters: computed in float32, in the weight's dtype.

        Args:
            entry: of the tensor.
            weight: `[out, in]`, whole.
            a: stacked, `[n * rank, in]`.
            b: `[out, rank]`.
        """
        parts = entry.to_hf(weight)
        for place, (_, own_a, own_b) in self.factors(entry, a, b):
            parts[place] = merged(parts[place], own_a, own_b, self.scale)
        return entry.to_megatron(parts)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return W + scale * B A, computed in float32, in the weight's dtype."""
    return (weight.float() + (b.float() @ a.float()) * scale).to(weight.dtype)


def module_name(hf_name: str) -> str:
    """Hugging Face's name of a linear layer, as PEFT takes it (q_proj), from its weight's."""
    return hf_name.split(".")[-2]


def path_of(row: Row) -> str:
    """Where Megatron's layer has the linear layer of a row: self_attention.linear_qkv, say."""
    return row.key.removeprefix(LAYER_PREFIX).removesuffix(".weight")


def key_of(entry: Entry, name: str) -> str:
    """Key of an adapter, A or B, in a checkpoint: it lies there as the entry of its weight."""
    return f"{entry.key.removesuffix('weight')}{name}"


def is_adapter(key: str) -> bool:
    """Whether a key of a checkpoint, or the name of a parameter, is an adapter's."""
    return key.endswith((f".{A}", f".{B}"))


def is_linear(row: Row) -> bool:
    """Whether a row is of a linear layer that all layers have: adapters can be added to these.

    Experts, and what stands in their place in other layers, have none. PEFT adds none to experts
    either where their weights are no linear layers, as in transformers 5.
    """
    weight = row.key.endswith(".weight") and len(row.shape) == 2
    return weight and row.per_layer and row.layers is None


def choose(
    mapping: WeightMapping, rank: int, alpha: float | None, targets: Sequence[str] | None
) -> Lora:
    """Decide about the adapters of a model.

    Args:
        mapping: of its tensors.
        rank: of all of them.
        alpha: default: twice the rank.
        targets: names of Hugging Face's linear layers, or `all-linear`, the default.

    Raises:
        UserError: a name that no such layer has, or a rank that is too large for one.
    """
    rows = [row for row in mapping.rows.values() if is_linear(row)]
    names = list(dict.fromkeys(module_name(name) for row in rows for name in row.hf_names))
    given = names if not targets or list(targets) == [ALL_LINEAR] else list(targets)
    for name in given:
        if name not in names:
            raise UserError(
                f"--lora-targets: {name} is no linear layer that all layers have, expected some of "
                f"{', '.join(names)}; or {ALL_LINEAR} alone, the default"
            )
    alpha = float(2 * rank if alpha is None else alpha)
    if not (math.isfinite(alpha) and alpha > 0):
        raise UserError(f"--lora-alpha is {alpha}, expected a number above 0")
    lora = Lora(rank, alpha, tuple(sorted(set(given))))
    for row in lora.rows(mapping):
        entry = mapping.entry(row.key, 0)
        for place in lora.places(row):
            size, name = min(entry.hf_shapes[place]), module_name(row.hf_names[place])
            if rank > size:
                raise UserError(
                    f"--lora-rank is {rank}, expected at most {size}: {name} has "
                    f"{' x '.join(map(str, entry.hf_shapes[place]))} weights"
                )
    return lora
