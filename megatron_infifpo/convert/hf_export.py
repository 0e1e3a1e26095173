"""Megatron -> Hugging Face: a folder of safetensors, read layer by layer, without a model."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo.convert.hf_shards import SHARD_BYTES, plan_shards, shapes_of, write_index
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.convert.model_weights import ModelWeights
from megatron_infifpo.families.architecture import hf_files
from megatron_infifpo.families.mapping import Entry, WeightMapping
from megatron_infifpo.storage.checkpoints import (
    RUN_FILE,
    carry,
    check_free,
    new_folder,
    original_dtype,
    write_config,
)
from megatron_infifpo.storage.safetensors_io import SafetensorsWriter, Scratch
from megatron_infifpo.storage.share import Share

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
    base: str | Path | None = None,
    hf: str | Path | None = None,
) -> None:
    """Convert a Megatron checkpoint, imported or trained at any layout, into a Hugging Face folder.

    Optimizer state and vocabulary padding are left out; adapters are merged into their base. One
    tensor of one layer is in memory at a time. Ranks of torchrun share the files.

    Args:
        load_dir: a checkpoint with the `hf` folder that import writes and training copies, or one
            of Megatron-LM, Megatron-Bridge or NeMo.
        save_dir: must not exist, or be empty.
        dtype: of the Hugging Face weights; default: that of the original, from config.json.
        iteration: which checkpoint; default: the latest.
        shard_bytes: size at which a new safetensors file begins.
        share: this rank's part of the files; default: one of all ranks'.
        flag: that names `save_dir` on the command line.
        base: of a checkpoint of adapters; default: where it was when they were trained.
        hf: of a checkpoint without that folder, a Hugging Face folder that says what it is.

    Raises:
        UserError: not a checkpoint, tensors that do not fit config.json, or nowhere to write.
    """
    check_free(save_dir, flag)
    weights, mapping, config = open_checkpoint(load_dir, iteration, base, hf)
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
            _write_shard(folder / name, shards[name], weights, dtype, bar)
        if share.first:
            write_index(folder, shards, dtype)
            carry(hf_files(hf or load_dir), folder)
            if (Path(load_dir) / RUN_FILE).is_file():
                shutil.copyfile(Path(load_dir) / RUN_FILE, folder / RUN_COPY)
            write_config(folder / "config.json", config, dtype)


def _write_shard(
    path: Path, entries: list[Entry], weights: ModelWeights, dtype: torch.dtype, bar: tqdm
) -> None:
    scratch = Scratch()
    with SafetensorsWriter(path, shapes_of(entries), dtype) as writer:
        for entry in entries:
            scratch.clear()
            parts = entry.to_hf(weights.read(entry, scratch))
            for name, part in zip(entry.hf_names, parts, strict=True):
                writer.write(name, part)
            bar.update()


def hf_tensors(weights: ModelWeights, mapping: WeightMapping) -> Iterator[dict[str, Tensor]]:
    """Yield the Hugging Face tensors that each Megatron tensor becomes, in the dtype on disk."""
    for entry in mapping.entries():
        parts = entry.to_hf(weights.read(entry))
        yield dict(zip(entry.hf_names, parts, strict=True))
