"""How the weights of a Hugging Face folder that is written are spread over files."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from megatron_infifpo.convert.hf_files import INDEX
from megatron_infifpo.families.mapping import Entry, WeightMapping

SHARD_BYTES = 5 * 10**9


def plan_shards(
    mapping: WeightMapping, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> dict[str, list[Entry]]:
    """Spread the entries over files, in order; an entry's tensors stay together.

    Returns:
        The entries of every file, by its name.
    """
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in mapping.entries():
        size = torch.Size(entry.shape).numel() * dtype.itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": s for i, s in enumerate(shards, start=1)}


def shapes_of(entries: Iterable[Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of the Hugging Face tensors of entries, by name."""
    return {
        name: shape
        for entry in entries
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }


def write_index(folder: Path, shards: Mapping[str, list[Entry]], dtype: torch.dtype) -> None:
    """Write which tensor is in which file, where there are several."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, entries in shards.items() for name in shapes_of(entries)}
    numbers = (torch.Size(e.shape).numel() for entries in shards.values() for e in entries)
    total = sum(numbers) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
