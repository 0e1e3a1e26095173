"""Which Megatron tensor is made of which Hugging Face tensors: declarative rows, and their use."""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_infifpo.families.transforms import IDENTITY, Dims, Transform
from megatron_infifpo.storage.checkpoints import NEMO_PREFIX

LAYER_PREFIX = "decoder.layers."
OUTPUT_LAYER = "output_layer.weight"
# How names of tensors end whose modules have an extra state.
_STATEFUL = (".weight", ".softmax_offset")
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
    def modules(self) -> int:
        """Modules that have a part of it: one, or as many as experts if it is of all of a layer."""
        return self.dims.experts if self.row.shape[0] == "experts" else 1

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


@dataclass(frozen=True)
class Keys:
    """How a checkpoint names tensors.

    Attributes:
        stacked: tensors of all layers lie in one, `[L, ...]`, and those of experts in one,
            `[L, E, ...]`; else the names of a layer's have its number, and those of its experts lie
            in one, `[E, ...]`.
        prefix: before every name.
    """

    stacked: bool
    prefix: str = ""

    @classmethod
    def found(cls, names: Collection[str]) -> "Keys | None":
        """Tell it by the names of a checkpoint's tensors; None: it holds no GPT model."""
        for prefix in ("", NEMO_PREFIX):
            start = prefix + LAYER_PREFIX
            inside = [name for name in names if name.startswith(start)]
            if inside:
                return cls(not any(name[len(start)].isdigit() for name in inside), prefix)
        return None

    @classmethod
    def ours(cls, args: Mapping[str, Any]) -> "Keys":
        """As import and training name them, given the model's Megatron arguments.

        Layers are stacked but where some have experts: Megatron has it so for a *list* of those.
        """
        return cls(stacked=_kinds(args) is None)


class WeightMapping:
    """All tensors of one model."""

    def __init__(self, rows: Sequence[Row], args: Mapping[str, Any], keys: Keys | None = None):
        """Take a family's rows and the model's Megatron arguments.

        A model that ties its output layer to the embedding has no row for the output layer.

        Args:
            rows, args: as above.
            keys: how a checkpoint names them; default: `Keys.ours`.
        """
        self.rows = {row.key: row for row in rows if row.needs is None or args[row.needs]}
        self.dims = Dims.from_args(args)
        self.num_layers: int = args["num_layers"]
        self._kinds = _kinds(args)
        self.keys = keys or Keys.ours(args)

    def entry(self, key: str, layer: int | None = None, expert: int | None = None) -> Entry:
        """Return the entry of a row, at a layer and an expert where it has them."""
        row, places, name = self.rows[key], [], key
        if layer is not None and self.keys.stacked:
            places.append(Place(layer, self.num_layers))
        elif layer is not None:
            name = key.replace(LAYER_PREFIX, f"{LAYER_PREFIX}{layer}.", 1)
        if row.per_expert:
            assert expert is not None
            places.append(Place(expert, self.dims.experts))
        return Entry(row, layer, expert, self.dims, self.keys.prefix + name, tuple(places))

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
        entries, number = self.tensors[key], 0
        for place, start in zip(entries[0].places, offset, strict=False):
            number = number * place.size + start
        return entries[number]

    @cached_property
    def extra_state_keys(self) -> dict[str, int]:
        """Keys of the empty `_extra_state` objects, with the number of shards of each.

        Every decoder module that Transformer Engine implements expects one on load.
        """
        return {
            key.rpartition(".")[0] + "._extra_state": sum(entry.modules for entry in entries)
            for key, entries in self.tensors.items()
            if key.startswith(f"{self.keys.prefix}decoder.") and key.endswith(_STATEFUL)
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
