"""Megatron -> Hugging Face: a folder of safetensors, read layer by layer, without a model."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo.convert.adapters import Adapters, adapted, holds_adapters
from megatron_infifpo.convert.block_fp8 import open_scored
from megatron_infifpo.convert.hf_folder import check_weights, open_hf
from megatron_infifpo.convert.hf_shards import SHARD_BYTES, plan_shards, shapes_of, write_index
from megatron_infifpo.convert.model_weights import FolderWeights, MegatronWeights, ModelWeights
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import Entry, WeightMapping
from megatron_infifpo.ranks import rank
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
    base: str | Path | None = None,
) -> None:
    """Convert a Megatron checkpoint, imported or trained at any layout, into a Hugging Face folder.

    Optimizer state and vocabulary padding are left out; adapters are merged into their base. One
    tensor of one layer is in memory at a time. Ranks of torchrun share the files.

    Args:
        load_dir: a checkpoint with the `hf` folder that import writes and training copies.
        save_dir: must not exist, or be empty.
        dtype: of the Hugging Face weights; default: that of the original, from config.json.
        iteration: which checkpoint; default: the latest.
        shard_bytes: size at which a new safetensors file begins.
        share: this rank's part of the files; default: one of all ranks'.
        flag: that names `save_dir` on the command line.
        base: of a checkpoint of adapters; default: where it was when they were trained.

    Raises:
        UserError: not a checkpoint, tensors that do not fit config.json, or nowhere to write.
    """
    check_free(save_dir, flag)
    weights, mapping, config = open_checkpoint(load_dir, iteration, base)
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
            carry(Path(load_dir) / HF_FOLDER, folder)
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


def open_checkpoint(
    load_dir: str | Path, iteration: int | None = None, base: str | Path | None = None
) -> tuple[ModelWeights, WeightMapping, dict[str, Any]]:
    """Open a Megatron checkpoint and check that it holds the model of its config.json.

    One of adapters alone is opened with its base, as the model that both are.

    Args:
        load_dir: of the checkpoint.
        iteration: which one; default: the latest.
        base: of adapters; default: where it was when they were trained.

    Raises:
        UserError: not a checkpoint, or a tensor is missing, surplus or of another shape; a base
            that is not there, has other weights than adapters were trained on, or is needless.
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
    if holds_adapters(checkpoint):
        adapters = Adapters.read(Path(load_dir))
        whole = _open_base(adapters, None if base is None else Path(base))
        return adapted(checkpoint, mapping, whole, adapters.lora), mapping, config
    if base is not None:
        raise UserError(f"--base has no effect: {load_dir} holds whole weights, no adapters")
    _check_tensors(checkpoint, mapping)
    return MegatronWeights(checkpoint), mapping, config


def open_weights(
    directory: str | Path, *, scored: bool = False
) -> tuple[ModelWeights, WeightMapping]:
    """Open the weights of a Hugging Face folder or a Megatron checkpoint, and check their shapes.

    Args:
        directory: of them.
        scored: for scoring alone, where a folder's may be in FP8 with scales of blocks.

    Raises:
        UserError: neither, an unsupported model, or tensors that do not fit config.json.
    """
    if not (Path(directory) / "config.json").is_file():
        return open_checkpoint(directory)[:2]
    weights, mapping = open_scored(directory) if scored else open_hf(directory)[:2]
    check_weights(weights, mapping)
    return FolderWeights(weights, mapping), mapping


def _open_base(adapters: Adapters, given: Path | None) -> ModelWeights:
    """Open what adapters belong to, once it is known to be that."""
    from megatron_infifpo.convert.fingerprint import weights_fingerprint  # here: it opens, too

    base = given or adapters.base
    if not base.is_dir():
        raise UserError(
            f"the base of the adapters is not in {base}, where it was: say with --base, or with "
            "--pretrained-checkpoint in training, where it is now"
        )
    if rank() == 0:
        adapters.check_base(base, weights_fingerprint(base))
    return open_weights(base)[0]


def _check_tensors(checkpoint: TorchDistCheckpoint, mapping: WeightMapping) -> None:
    """Refuse a checkpoint of another model than its config.json describes."""
    path, found = checkpoint.directory, set(checkpoint.names())
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


def hf_tensors(weights: ModelWeights, mapping: WeightMapping) -> Iterator[dict[str, Tensor]]:
    """Yield the Hugging Face tensors that each Megatron tensor becomes, in the dtype on disk."""
    for entry in mapping.entries():
        parts = entry.to_hf(weights.read(entry))
        yield dict(zip(entry.hf_names, parts, strict=True))
