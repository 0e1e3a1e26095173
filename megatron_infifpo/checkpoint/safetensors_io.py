"""Read and write the safetensors of a Hugging Face folder, one tensor at a time."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_infifpo.checkpoint.mapping import WeightMapping
from megatron_infifpo.cli import UserError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
# safetensors' names of the dtypes that weights may have.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that old files hold and that follow from config.json.
_DERIVED = "rotary_emb.inv_freq"


class HfWeights:
    """The tensors of a Hugging Face folder; files are mapped, and read when a tensor is."""

    def __init__(self, directory: str | Path):
        """Open the folder's safetensors.

        Raises:
            UserError: no such folder, no safetensors in it, or a broken file.
        """
        self.directory = Path(directory)
        self._files: dict[str, Any] = {}
        for path in self._paths():
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"cannot read {path}: {error}; copy the file again") from error
            self._files.update(dict.fromkeys(file.keys(), file))

    def _paths(self) -> list[Path]:
        if not self.directory.is_dir():
            raise UserError(f"{self.directory} is not a folder: expected a Hugging Face checkpoint")
        index = self.directory / INDEX
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return [self.directory / name for name in sorted(set(names))]
        single = self.directory / "model.safetensors"
        if single.is_file():
            return [single]
        if any(self.directory.glob("*.bin")):
            raise UserError(
                f"{self.directory} holds pickled weights (*.bin), which can run code when loaded: "
                "expected model.safetensors, convert them with save_pretrained on a machine "
                "where you trust them"
            )
        raise UserError(f"{self.directory} holds neither model.safetensors nor {INDEX}")

    def names(self) -> list[str]:
        """Names of all tensors, sorted, without buffers that follow from the configuration."""
        return sorted(name for name in self._files if not name.endswith(_DERIVED))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; UserError if it is none that a model is trained in."""
        kind = self._files[name].get_slice(name).get_dtype()
        if kind not in DTYPES:
            raise UserError(
                f"{self.directory}: tensor {name} is {kind}, expected one of {', '.join(DTYPES)}: "
                "quantized weights are not supported"
            )
        return DTYPES[kind]

    def load(self, name: str) -> Tensor:
        """Return a tensor on the CPU, mapped from its file."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def check_weights(weights: HfWeights, mapping: WeightMapping) -> torch.dtype:
    """Compare a folder's tensors with those that its configuration asks for.

    Returns:
        The dtype of the weights.

    Raises:
        UserError: a tensor is missing, surplus or of another shape, or dtypes are mixed.
    """
    where = weights.directory
    shapes = {
        name: shape
        for entry in mapping.entries()
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    found = set(weights.names())
    if missing := sorted(shapes.keys() - found):
        raise UserError(
            f"{where}: tensor {_some(missing)} is missing: config.json asks for it, "
            "so the folder is incomplete or of another model"
        )
    if surplus := sorted(found - shapes.keys() - _tied_head(weights, mapping)):
        raise UserError(
            f"{where}: tensor {_some(surplus)} is unknown: config.json describes a model without "
            "it, so converting would lose weights"
        )
    for name, shape in shapes.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(weights.shape(name))}, but config.json "
                f"asks for {list(shape)}"
            )
    dtypes = {weights.dtype(name): name for name in shapes}
    if len(dtypes) > 1:
        mixed = " and ".join(f"{name} {dtype}" for dtype, name in dtypes.items())
        raise UserError(f"{where}: weights have mixed dtypes ({mixed}): save them with one dtype")
    return next(iter(dtypes))


def _tied_head(weights: HfWeights, mapping: WeightMapping) -> set[str]:
    """Names of a copy of the embedding that some tied models store as their output layer."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = "output_layer.weight" not in mapping.rows
    if not tied or head not in weights.names():
        return set()
    if not torch.equal(weights.load(head), weights.load(embedding)):
        raise UserError(
            f"{weights.directory}: config.json ties the output layer to the embedding, but "
            f"{head} differs from {embedding}: set tie_word_embeddings to false if it is right"
        )
    return {head}


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def write_weights(
    directory: Path,
    sizes: Iterable[int],
    groups: Iterator[dict[str, Tensor]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write safetensors under Hugging Face's names, in shards, with an index if there are several.

    At most one shard is in memory.

    Args:
        directory: an existing folder.
        sizes: bytes of each group, known before its tensors are.
        groups: tensors by name; a group is never divided.
        shard_bytes: size at which a new shard begins.
    """
    counts = _groups_per_shard(sizes, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for number, count in enumerate(counts, start=1):
        name = f"model-{number:05d}-of-{len(counts):05d}.safetensors"
        name = "model.safetensors" if len(counts) == 1 else name
        shard: dict[str, Tensor] = {}
        for _ in range(count):
            shard |= next(groups)
        total += sum(tensor.nbytes for tensor in shard.values())
        weight_map |= dict.fromkeys(shard, name)
        save_file(shard, directory / name, metadata={"format": "pt"})
    if len(counts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _groups_per_shard(sizes: Iterable[int], shard_bytes: int) -> list[int]:
    counts, filled = [0], 0
    for size in sizes:
        if counts[-1] and filled + size > shard_bytes:
            counts.append(0)
            filled = 0
        counts[-1] += 1
        filled += size
    return counts
