"""A model's weights as Megatron has them, wherever they lie: one tensor of one layer at a time."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.families.lora import Lora, key_of
from megatron_infifpo.families.mapping import Entry, WeightMapping
from megatron_infifpo.storage.safetensors_io import Scratch
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint


class ModelWeights(Protocol):
    """What converters read weights from."""

    def dtype(self, entry: Entry) -> torch.dtype:
        """Dtype that a Megatron tensor is stored in."""

    def read(self, entry: Entry, scratch: Scratch | None = None) -> Tensor:
        """Read a Megatron tensor: of one layer or expert, and without vocabulary padding.

        It is in memory of its own, or in the scratch memory.
        """


class MegatronWeights:
    """Those of a checkpoint."""

    def __init__(self, checkpoint: TorchDistCheckpoint, mapping: WeightMapping):
        """Take the checkpoint's files, and the mapping with the names that it gives tensors."""
        self.checkpoint, self.mapping = checkpoint, mapping

    def dtype(self, entry: Entry) -> torch.dtype:
        """See `ModelWeights`."""
        return self.checkpoint.dtype(self._stored(entry).key)

    def read(self, entry: Entry, scratch: Scratch | None = None) -> Tensor:
        """See `ModelWeights`."""
        stored = self._stored(entry)
        part = self.checkpoint.read(stored.key, stored.offset, stored.chunk, scratch)
        return part.view(entry.shape)

    def _stored(self, entry: Entry) -> Entry:
        return self.mapping.entry(entry.row.key, entry.layer, entry.expert)


class FolderWeights:
    """Those of a Hugging Face folder, in Megatron's layout."""

    def __init__(self, weights: HfWeights):
        """Take the folder's tensors."""
        self.weights = weights

    def dtype(self, entry: Entry) -> torch.dtype:
        """See `ModelWeights`."""
        return self.weights.dtype(entry.hf_names[0])

    def read(self, entry: Entry, scratch: Scratch | None = None) -> Tensor:
        """See `ModelWeights`."""
        return entry.to_megatron([self.weights.load(name, scratch) for name in entry.hf_names])


class AdaptedWeights:
    """Those of a base with low-rank adapters that a checkpoint holds."""

    def __init__(
        self,
        base: ModelWeights,
        adapters: TorchDistCheckpoint,
        mapping: WeightMapping,
        lora: Lora,
    ):
        """Take the base; the checkpoint of adapters, the names in it, and what they are."""
        self.base, self.adapters, self.mapping, self.lora = base, adapters, mapping, lora

    def dtype(self, entry: Entry) -> torch.dtype:
        """See `ModelWeights`: the base's."""
        return self.base.dtype(entry)

    def read(self, entry: Entry, scratch: Scratch | None = None) -> Tensor:
        """See `ModelWeights`: added in float32."""
        weight = self.base.read(entry, scratch)
        pair = self.adapters_of(entry)
        return weight if pair is None else self.lora.merge(entry, weight, *pair)

    def adapters_of(self, entry: Entry) -> tuple[Tensor, Tensor] | None:
        """A and B of a Megatron tensor, in its layout; None where it has none."""
        if not self.lora.has(entry.row):
            return None
        stored, found = self.mapping.entry(entry.row.key, entry.layer), []
        starts = tuple(place.start for place in stored.places)
        for name, shape in self.lora.shapes(entry).items():
            part = (*(1 for _ in starts), *shape)
            whole = self.adapters.read(key_of(stored, name), (*starts, 0, 0), part)
            found.append(whole.view(shape))
        return found[0], found[1]
