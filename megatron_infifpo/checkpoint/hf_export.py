"""Megatron -> Hugging Face: a folder of safetensors, read layer by layer, without a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo.checkpoint.layout import (
    HF_FOLDER,
    carry,
    check_free,
    find_checkpoint,
    new_folder,
    original_dtype,
    write_dtype,
)
from megatron_infifpo.checkpoint.mapping import Entry, WeightMapping
from megatron_infifpo.checkpoint.safetensors_io import SHARD_BYTES, write_weights
from megatron_infifpo.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_infifpo.cli import UserError
from megatron_infifpo.models.architecture import read_hf_config
from megatron_infifpo.models.families import weight_mapping


def export_checkpoint(
    load_dir: str | Path,
    save_dir: str | Path,
    dtype: torch.dtype | None = None,
    iteration: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert a Megatron checkpoint, imported or trained at any layout, into a Hugging Face folder.

    Optimizer state and vocabulary padding are left out. At most one shard is in memory.

    Args:
        load_dir: a checkpoint with the `hf` folder that import writes and training copies.
        save_dir: must not exist, or be empty.
        dtype: of the Hugging Face weights; default: that of the original, from config.json.
        iteration: which checkpoint; default: the latest.
        shard_bytes: size at which a new safetensors file begins.

    Raises:
        UserError: not a checkpoint, tensors that do not fit config.json, or nowhere to write.
    """
    check_free(save_dir)
    checkpoint, mapping, config = open_checkpoint(load_dir, iteration)
    dtype = dtype or original_dtype(config)
    sizes = [torch.Size(entry.shape).numel() * dtype.itemsize for entry in mapping.entries()]
    bar = tqdm(hf_tensors(checkpoint, mapping), total=len(sizes), unit="tensor", desc="export")
    with new_folder(save_dir) as folder, bar:
        converted = (
            {name: part.to(dtype).contiguous() for name, part in group.items()} for group in bar
        )
        write_weights(folder, sizes, converted, shard_bytes)
        carry(Path(load_dir) / HF_FOLDER, folder)
        write_dtype(folder / "config.json", dtype)


def open_checkpoint(
    load_dir: str | Path, iteration: int | None = None
) -> tuple[TorchDistCheckpoint, WeightMapping, dict[str, Any]]:
    """Open a Megatron checkpoint and check that it holds the model of its config.json.

    Raises:
        UserError: not a checkpoint, or a tensor is missing, surplus or of another shape.
    """
    path = find_checkpoint(load_dir, iteration)
    if not (Path(load_dir) / HF_FOLDER / "config.json").is_file():
        raise UserError(
            f"{load_dir} has no {HF_FOLDER}/config.json, which import writes and training copies: "
            f"copy the folder {HF_FOLDER} of the imported pivot there"
        )
    config = read_hf_config(load_dir)
    mapping = weight_mapping(config)
    checkpoint = TorchDistCheckpoint(path)
    found = set(checkpoint.names())
    for key in sorted(mapping.rows.keys() - found):
        raise UserError(f"{path}: tensor {key} is missing: hf/config.json asks for it")
    for key in sorted(found - mapping.rows.keys()):
        raise UserError(
            f"{path}: tensor {key} is unknown: hf/config.json describes a model without it"
        )
    for row in mapping.rows.values():
        shape, expected = checkpoint.shape(row.key), mapping.entry(row.key).shape
        if row.per_layer:
            expected = (mapping.num_layers, *expected)
        padded = row.shape[0] == "vocab" and shape[0] >= expected[0] and shape[1:] == expected[1:]
        if shape != expected and not padded:
            raise UserError(
                f"{path}: tensor {row.key} has shape {list(shape)}, but hf/config.json asks for "
                f"{list(expected)}"
            )
    return checkpoint, mapping, config


def read_entry(checkpoint: TorchDistCheckpoint, entry: Entry) -> Tensor:
    """Read one Megatron tensor: of one layer, and without vocabulary padding."""
    rest = (0,) * len(entry.shape)
    if entry.layer is None:
        return checkpoint.read(entry.row.key, rest, entry.shape)
    return checkpoint.read(entry.row.key, (entry.layer, *rest), (1, *entry.shape)).squeeze(0)


def hf_tensors(
    checkpoint: TorchDistCheckpoint, mapping: WeightMapping
) -> Iterator[dict[str, Tensor]]:
    """Yield the Hugging Face tensors that each Megatron tensor becomes, in the dtype on disk."""
    for entry in mapping.entries():
        parts = entry.to_hf(read_entry(checkpoint, entry))
        yield dict(zip(entry.hf_names, parts, strict=True))
