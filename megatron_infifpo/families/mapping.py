"""Which Megatron tensor is made of which Hugging Face tensors: declarative rows, and their use."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.families.transforms import IDENTITY, Dims, Transform

LAYER_PREFIX = "decoder.layers."
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        key: name in a Megatron checkpoint; tensors of all layers share one (`decoder.layers.`).
        hf_names: names in the Hugging Face folder, `{}` standing for the layer.
        shape: names of `Dims` sizes, for one layer.
        transform: the layout that joins them.
        needs: a Megatron argument that is false in models without this tensor.
    """

    key: str
    hf_names: tuple[str, ...]
    shape: tuple[str, ...]
    transform: Transform = IDENTITY
    needs: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer has this tensor."""
        return self.key.startswith(LAYER_PREFIX)


@dataclass(frozen=True)
class Entry:
    """A row at one layer, or a global row (`layer` is None)."""

    row: Row
    layer: int | None
    dims: Dims

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor: one layer's, vocabulary without padding."""
        return tuple(getattr(self.dims, size) for size in self.row.shape)

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors."""
        return tuple(name.format(self.layer) for name in self.row.hf_names)

    @property
    def hf_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the Hugging Face tensors, in the order of `hf_names`."""
        return [tuple(part.shape) for part in self.to_hf(torch.empty(self.shape, device="meta"))]

    def to_megatron(self, parts: Sequence[Tensor]) -> Tensor:
        """Join Hugging Face tensors, in the order of `hf_names`."""
        return self.row.transform.to_megatron(parts, self.dims)

    def to_hf(self, tensor: Tensor) -> list[Tensor]:
        """Split a Megatron tensor into Hugging Face tensors, in the order of `hf_names`."""
        return self.row.transform.to_hf(tensor, self.dims)


class WeightMapping:
    """All tensors of one model."""

    def __init__(self, rows: Sequence[Row], args: Mapping[str, Any]):
        """Take a family's rows and the model's Megatron arguments.

        A model that ties its output layer to the embedding has no row for the output layer.
        """
        self.rows = {row.key: row for row in rows if row.needs is None or args[row.needs]}
        self.dims = Dims.from_args(args)
        self.num_layers: int = args["num_layers"]

    def entry(self, key: str, layer: int | None = None) -> Entry:
        """Return the entry of a Megatron key, at a layer if the key is one of the layers'."""
        return Entry(self.rows[key], layer, self.dims)

    def entries(self) -> Iterator[Entry]:
        """Every entry, in the order of Hugging Face files: embedding, layers, norm, output."""
        for row in self.rows.values():
            if row.key.startswith("embedding."):
                yield Entry(row, None, self.dims)
        for layer in range(self.num_layers):
            for row in self.rows.values():
                if row.per_layer:
                    yield Entry(row, layer, self.dims)
        for row in self.rows.values():
            if not row.per_layer and not row.key.startswith("embedding."):
                yield Entry(row, None, self.dims)

    @cached_property
    def extra_state_keys(self) -> dict[str, int]:
        """Keys of the empty `_extra_state` objects, with the number of shards of each.

        Every decoder module that Transformer Engine implements expects one on load.
        """
        return {
            row.key.removesuffix("weight") + "_extra_state": self.num_layers if row.per_layer else 1
            for row in self.rows.values()
            if row.key.startswith("decoder.") and row.key.endswith(".weight")
        }
