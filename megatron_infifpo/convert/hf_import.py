"""Hugging Face -> Megatron: a torch_dist checkpoint, written layer by layer, without a model."""

import warnings
from argparse import Namespace
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.convert.hf_folder import check_weights, only_dtype, open_hf
from megatron_infifpo.convert.peft import MergedFolder
from megatron_infifpo.convert.vocabulary import warn_of_tokens_beyond
from megatron_infifpo.families import family, megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import Entry, WeightMapping
from megatron_infifpo.storage.beside import other_formats
from megatron_infifpo.storage.checkpoints import (
    HF_FOLDER,
    TRACKER,
    carry,
    check_free,
    new_folder,
    write_config,
)
from megatron_infifpo.storage.safetensors_io import Scratch
from megatron_infifpo.storage.share import Share
from megatron_infifpo.storage.torch_dist_writer import LazyTensor, write


def import_checkpoint(
    hf_dir: str | Path,
    save_dir: str | Path,
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
) -> None:
    """Convert a Hugging Face folder into a Megatron checkpoint.

    Megatron loads `save_dir` as a release with `--load save_dir --finetune --no-load-optim
    --no-load-rng`; `save_dir/hf` carries the configuration and the tokenizer. One tensor of one
    layer is in memory at a time. Ranks of torchrun share the layers.

    Args:
        hf_dir: config.json, safetensors, tokenizer files.
        save_dir: must not exist, or be empty.
        dtype: of the Megatron weights; default: that of the Hugging Face weights, if it is one.
        adapter: a PEFT folder of low-rank adapters, to be merged into the weights.

    Raises:
        UserError: an unsupported model, tensors that do not fit config.json, or nowhere to write.
    """
    check_free(save_dir)
    weights, mapping, config = open_hf(hf_dir)
    dtypes = check_weights(weights, mapping)
    if adapter is not None:
        weights = MergedFolder(weights, adapter, family(read_hf_config(hf_dir)).hf_name)
    share = Share()
    dtype = dtype or only_dtype(dtypes, hf_dir)
    if share.first and (others := other_formats(Path(hf_dir))):
        print(f"{hf_dir}: not read, as model weights are in safetensors: {', '.join(others)}")
    with (
        new_folder(save_dir, share) as folder,
        tqdm(unit="tensor", desc="import", disable=not share.first) as bar,
    ):
        tensors = _lazy_tensors(mapping, weights, dtype, share, bar)
        bar.total = sum(len(tensor.chunks) for tensor in tensors.values())
        release = folder / "release"
        release.mkdir(exist_ok=True)
        arguments = megatron_args(config)
        state = common_state(arguments)
        write(release, tensors, mapping.extra_state_keys, state, share)
        if share.first:
            carry_architecture(Path(hf_dir), folder / HF_FOLDER, config, dtypes, dtype)
            (folder / TRACKER).write_text("release", encoding="utf-8")
    complaint = warn_of_tokens_beyond(Path(hf_dir), arguments["padded_vocab_size"])
    if share.first and complaint:
        warnings.warn(complaint, stacklevel=2)


def carry_architecture(
    hf_dir: Path,
    target: Path,
    config: dict[str, Any],
    dtypes: Collection[torch.dtype],
    dtype: torch.dtype,
) -> None:
    """Copy what a checkpoint carries of a Hugging Face folder, and export gives back.

    Args:
        hf_dir: the folder.
        target: the checkpoint's `hf`.
        config: the model's config.json, as `open_hf` returns it.
        dtypes: of its weights.
        dtype: that weights of several get.
    """
    carry(hf_dir, target)
    # Export goes back to the dtype of the weights, whatever config.json says about them.
    original = next(iter(dtypes)) if len(dtypes) == 1 else dtype
    write_config(target / "config.json", config, original)


def _lazy_tensors(
    mapping: WeightMapping, weights: HfWeights, dtype: torch.dtype, share: Share, bar: tqdm
) -> dict[str, LazyTensor]:
    """This rank's chunks of all tensors: whole layers, and every so many of the other tensors."""
    tensors = {}
    scratch = Scratch()
    for number, (key, entries) in enumerate(mapping.tensors.items()):
        mine = [e for e in entries if share.mine(number if e.layer is None else e.layer)]
        if mine:
            tensors[key] = _lazy_tensor(mine, weights, dtype, scratch, bar)
    return tensors


def common_state(args: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's common state of a release, for `--use-checkpoint-args` among others."""
    namespace = Namespace(
        **args,
        iteration=0,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        ckpt_format="torch_dist",
        apply_query_key_layer_scaling=False,
    )
    return {"args": namespace, "checkpoint_version": 3.0, "iteration": 0}


def _lazy_tensor(
    entries: list[Entry],
    weights: HfWeights,
    dtype: torch.dtype,
    scratch: Scratch,
    bar: tqdm,
) -> LazyTensor:
    """Chunks of one tensor, an entry each."""
    at = {entry.offset: entry for entry in entries}
    first = entries[0]

    def load(offset: tuple[int, ...]) -> Tensor:
        entry = at[offset]
        scratch.clear()  # chunks are written one after the other
        parts = [weights.load(name, scratch) for name in entry.hf_names]
        bar.update()
        return entry.to_megatron(parts).to(dtype).view(entry.chunk).contiguous()

    return LazyTensor(first.whole, list(at), first.chunk, dtype, load)
