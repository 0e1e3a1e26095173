"""Low-rank adapters (LoRA) beside frozen weights, counted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES
from megatron_infifpo.families.lora import ALL_LINEAR, is_linear, module_name
from megatron_infifpo.families.mapping import WeightMapping

# Megatron's linear layers whose outputs are split over tensor-parallel ranks; of others, inputs.
_BY_COLUMNS = ("linear_qkv.weight", "linear_fc1.weight")


@dataclass(frozen=True)
class Linear:
    """A linear layer that may be adapted: its outputs, its inputs, which of them ranks split."""

    outputs: int
    inputs: int
    by_columns: bool


@dataclass(frozen=True)
class Adapters:
    """Adapters of a layer: `B A` beside each of some weights, `A` `[rank, inputs]`.

    Attributes:
        rank: inner width.
        linears: that are adapted.
    """

    rank: int
    linears: tuple[Linear, ...]

    @classmethod
    def of(cls, model: Mapping[str, Any], rank: int, targets: Sequence[str] = ()) -> "Adapters":
        """Take the linear layers of a model.

        Args:
            model: Megatron's arguments, as `families.megatron_args` has them.
            rank: of the adapters.
            targets: names of linear layers in Hugging Face files; none, or `all-linear`: all.

        Raises:
            UserError: the model has no linear layer of such a name in all layers.
        """
        found = linears(model)
        targets = () if list(targets) == [ALL_LINEAR] else targets
        unknown = [name for name in targets if name not in found]
        if unknown:
            raise UserError(
                f"--lora-targets {' '.join(unknown)}: a {model['family']} model has "
                f"{', '.join(found)}; or {ALL_LINEAR} alone"
            )
        return cls(rank, tuple(found[name] for name in targets or found))

    @property
    def parameters(self) -> int:
        """Parameters of a layer's adapters."""
        return sum(self.rank * (one.inputs + one.outputs) for one in self.linears)

    def rows(self, tensor: int) -> int:
        """Numbers that adapters keep of one token of a rank: what `A` made of it.

        Where outputs are split, every tensor-parallel rank has those of all their tokens.
        """
        return sum(self.rank * (tensor if one.by_columns else 1) for one in self.linears)

    def on_rank(self, tensor: int) -> float:
        """Parameters of a layer's adapters on a tensor-parallel rank: one of both is whole."""
        return sum(
            self.rank * (one.inputs + one.outputs / tensor)
            if one.by_columns
            else self.rank * (one.inputs / tensor + one.outputs)
            for one in self.linears
        )


def linears(model: Mapping[str, Any]) -> dict[str, Linear]:
    """Return the linear layers of a decoder layer, by their names in Hugging Face files."""
    mapping = WeightMapping(FAMILIES[model["family"]].rows, model)
    entries = [mapping.entry(row.key, 0) for row in mapping.rows.values() if is_linear(row)]
    return {
        module_name(name): Linear(shape[0], shape[1], entry.row.key.endswith(_BY_COLUMNS))
        for entry in entries
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
