"""Which Megatron tensor is made of which Hugging Face tensors: declarative rows, and their use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_infifpo.families.transforms import IDENTITY, Dims, Transform

LAYER_PREFIX = "decoder.layers."
OUTPUT_LAYER = "output_layer.weight"
# Kinds of layers that not all rows are of.
DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True)
class Row:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Attributes:
        key: name in a Megatron checkpoint, less the number of a layer.
        hf_names: names in the Hugging Face folder, `{}` standing for the layer, and a second one
            for the expert.
        shape: names of `Dims` sizes, for one layer, or one expert.
        transform: the layout that joins them.
        needs: a Megatron argument that is false in models without this tensor.
        layers: the kind that has it: `DENSE`, `SPARSE` (those of experts), or None: all.
        per_expert: every expert of a layer has this tensor.
        stateless: whose module has no extra state in Transformer Engine's layers either.
    """

    key: str
    hf_names: tuple[str, ...]
    shape: tuple[str, ...]
    transform: Transform = IDENTITY
    needs: str | None = None
    layers: str | None = None
    per_expert: bool = False
    stateless: bool = False

    @property
    def per_layer(self) -> bool:
        """Whether layers have this tensor."""
        return self.key.startswith(LAYER_PREFIX)


class Place(NamedTuple):
    """Where a tensor lies along an axis that a checkpoint puts before its own."""

    start: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A row at one layer, and one expert of it; or a global row (`layer` is None).

    Attributes:
        row, layer, expert: as above.
        dims: sizes of the model.
        key: name in a Megatron checkpoint.
        places: in the tensor of that name: its layer of a tensor of all layers, or its expert.
    """

    row: Row
    layer: int | None
    expert: int | None
    dims: Dims
    key: str
    places: tuple[Place, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor: one layer's or expert's, vocabulary without padding."""
        return tuple(getattr(self.dims, size) for size in self.row.shape)

    @property
    def whole(self) -> tuple[int, ...]:
        """Shape of the tensor that a checkpoint has: of all layers, or of all experts."""
        return (*(place.size for place in self.places), *self.shape)

    @property
    def offset(self) -> tuple[int, ...]:
        """Where it begins in that."""
        return (*(place.start for place in self.places), *(0 for _ in self.row.shape))

    @property
    def chunk(self) -> tuple[int, ...]:
        """Its own shape there."""
        return (*(1 for _ in self.places), *self.shape)

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Names of the Hugging Face tensors."""
        return tuple(name.format(self.layer, self.expert) for name in self.row.hf_names)

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
    """All tensors of one model.

    Tensors of all layers lie in one, `[L, ...]`, where all layers are of one kind. Where some have
    experts each layer's have names of their own, as Megatron has it for a *list* of the layers with
    experts, all or some: those of a layer's experts lie in one, `[E, ...]`.
    """

    def __init__(self, rows: Sequence[Row], args: Mapping[str, Any]):
        """Take a family's rows and the model's Megatron arguments.

        A model that ties its output layer to the embedding has no row for the output layer.
        """
        self.rows = {row.key: row for row in rows if row.needs is None or args[row.needs]}
        self.dims = Dims.from_args(args)
        self.num_layers: int = args["num_layers"]
        self._kinds = _kinds(args)

    def entry(self, key: str, layer: int | None = None, expert: int | None = None) -> Entry:
        """Return the entry of a row, at a layer and an expert where it has them."""
        row, own = self.rows[key], self._kinds is not None and layer is not None
        places = []
        if layer is not None and not own:
            places.append(Place(layer, self.num_layers))
        if row.per_expert:
            assert expert is not None
            places.append(Place(expert, self.dims.experts))
        name = key.replace(LAYER_PREFIX, f"{LAYER_PREFIX}{layer}.", 1) if own else key
        return Entry(row, layer, expert, self.dims, name, tuple(places))

    def entries(self) -> Iterator[Entry]:
        """Every entry, in the order of Hugging Face files: embedding, layers, norm, output."""
        for row in self.rows.values():
            if row.key.startswith("embedding."):
                yield self.entry(row.key)
        for layer in range(self.num_layers):
            for row in self.rows.values():
                if row.per_layer and row.layers in (None, self.kind(layer)):
                    for expert in range(self.dims.experts) if row.per_expert else (None,):
                        yield self.entry(row.key, layer, expert)
        for row in self.rows.values():
            if not row.per_layer and not row.key.startswith("embedding."):
                yield self.entry(row.key)

    def kind(self, layer: int) -> str:
        """Whether a layer is `DENSE` or `SPARSE`."""
        return DENSE if self._kinds is None else self._kinds[layer]

    @cached_property
    def tensors(self) -> dict[str, list[Entry]]:
        """Of every tensor of a Megatron checkpoint the entries that it consists of, in order."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries():
            found.setdefault(entry.key, []).append(entry)
        return found

    def at(self, key: str, offset: Sequence[int]) -> Entry:
        """Return the entry in which a part of a checkpoint's tensor lies.

        Args:
            key: the tensor's name.
            offset: where the part begins in it.
        """
        entries = self.tensors[key]
        return entries[offset[0]] if entries[0].places else entries[0]

    @cached_property
    def extra_state_keys(self) -> dict[str, int]:
        """Keys of the empty `_extra_state` objects, with the number of shards of each.

        Every decoder module that Transformer Engine implements expects one on load.
        """
        return {
            key.removesuffix("weight") + "_extra_state": len(entries)
            for key, entries in self.tensors.items()
            if key.startswith("decoder.") and key.endswith(".weight")
            if not entries[0].row.stateless
        }

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(entry.shape) for entry in self.entries())


def _kinds(args: Mapping[str, Any]) -> list[str] | None:
    """Kind of every layer; None where all are of one, without experts."""
    if not args.get("num_experts"):
        return None
    return [SPARSE if sparse else DENSE for sparse in args["moe_layer_freq"]]
