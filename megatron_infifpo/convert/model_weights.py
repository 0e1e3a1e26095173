"""A model's weights as Megatron has them, wherever they lie: one tensor of one layer at a time."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.families.lora import A, B, Lora, key_of
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

    def __init__(self, base: ModelWeights, adapters: TorchDistCheckpoint, lora: Lora):
        """Take the base, the checkpoint of adapters, and what they are."""
        self.base, self.adapters, self.lora = base, adapters, lora

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
        if key_of(entry.row, A) not in self.adapters.names():
            return None
        shapes, found = self.lora.shapes(entry), []
        assert entry.layer is not None
        for name in (A, B):  # those of all layers lie in one tensor
            whole, part = (entry.layer, 0, 0), (1, *shapes[name])
            found.append(self.adapters.read(key_of(entry.row, name), whole, part).squeeze(0))
        return found[0], found[1]
