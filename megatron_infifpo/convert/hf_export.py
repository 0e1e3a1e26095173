"""Megatron -> Hugging Face: a folder of safetensors, read layer by layer, without a model."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo.convert.hf_shards import SHARD_BYTES, plan_shards, shapes_of, write_index
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import Entry, WeightMapping
from megatron_infifpo.storage.checkpoints import (
    HF_FOLDER,
    RUN_FILE,
    carry,
    check_free,
    find_checkpoint,
    new_folder,
    original_dtype,
    write_config,
)
from megatron_infifpo.storage.safetensors_io import SafetensorsWriter, Scratch
from megatron_infifpo.storage.share import Share
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

RUN_COPY = f"infifpo_{RUN_FILE}"  # what an exported folder calls it


def export_checkpoint(
    load_dir: str | Path,
    save_dir: str | Path,
    dtype: torch.dtype | None = None,
    iteration: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    *,
    share: Share | None = None,
    flag: str = "--save",
) -> None:
    """Convert a Megatron checkpoint, imported or trained at any layout, into a Hugging Face folder.

    Optimizer state and vocabulary padding are left out. One tensor of one layer is in memory at a
    time. Ranks of torchrun share the files.

    Args:
        load_dir: a checkpoint with the `hf` folder that import writes and training copies.
        save_dir: must not exist, or be empty.
        dtype: of the Hugging Face weights; default: that of the original, from config.json.
        iteration: which checkpoint; default: the latest.
        shard_bytes: size at which a new safetensors file begins.
        share: this rank's part of the files; default: one of all ranks'.
        flag: that names `save_dir` on the command line.

    Raises:
        UserError: not a checkpoint, tensors that do not fit config.json, or nowhere to write.
    """
    check_free(save_dir, flag)
    checkpoint, mapping, config = open_checkpoint(load_dir, iteration)
    dtype = dtype or original_dtype(config)
    shards = plan_shards(mapping, dtype, shard_bytes)
    share = share or Share()
    mine = [name for number, name in enumerate(shards) if share.mine(number)]
    count = sum(len(shards[name]) for name in mine)
    with (
        new_folder(save_dir, share, flag) as folder,
        tqdm(total=count, unit="tensor", desc="export", disable=not share.first) as bar,
    ):
        for name in mine:
            _write_shard(folder / name, shards[name], checkpoint, dtype, bar)
        if share.first:
            write_index(folder, shards, dtype)
            carry(Path(load_dir) / HF_FOLDER, folder)
            if (Path(load_dir) / RUN_FILE).is_file():
                shutil.copyfile(Path(load_dir) / RUN_FILE, folder / RUN_COPY)
            write_config(folder / "config.json", config, dtype)


def _write_shard(
    path: Path, entries: list[Entry], checkpoint: TorchDistCheckpoint, dtype: torch.dtype, bar: tqdm
) -> None:
    scratch = Scratch()
    with SafetensorsWriter(path, shapes_of(entries), dtype) as writer:
        for entry in entries:
            scratch.clear()
            parts = entry.to_hf(read_entry(checkpoint, entry, scratch))
            for name, part in zip(entry.hf_names, parts, strict=True):
                writer.write(name, part)
            bar.update()


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
    checkpoint.check_sizes()
    found = set(checkpoint.names())
    for key in sorted(mapping.tensors.keys() - found):
        raise UserError(f"{path}: tensor {key} is missing: hf/config.json asks for it")
    for key in sorted(found - mapping.tensors.keys()):
        raise UserError(
            f"{path}: tensor {key} is unknown: hf/config.json describes a model without it"
        )
    for key, (entry, *_) in mapping.tensors.items():
        shape, expected = checkpoint.shape(key), entry.whole
        vocabulary = entry.row.shape[0] == "vocab"
        padded = vocabulary and shape[0] >= expected[0] and shape[1:] == expected[1:]
        if shape != expected and not padded:
            raise UserError(
                f"{path}: tensor {key} has shape {list(shape)}, but hf/config.json asks for "
                f"{list(expected)}"
            )
    return checkpoint, mapping, config


def read_entry(
    checkpoint: TorchDistCheckpoint, entry: Entry, scratch: Scratch | None = None
) -> Tensor:
    """Read one Megatron tensor: of one layer or expert, and without vocabulary padding."""
    return checkpoint.read(entry.key, entry.offset, entry.chunk, scratch).view(entry.shape)


def hf_tensors(
    checkpoint: TorchDistCheckpoint, mapping: WeightMapping
) -> Iterator[dict[str, Tensor]]:
    """Yield the Hugging Face tensors that each Megatron tensor becomes, in the dtype on disk."""
    for entry in mapping.entries():
        parts = entry.to_hf(read_entry(checkpoint, entry))
        yield dict(zip(entry.hf_names, parts, strict=True))
