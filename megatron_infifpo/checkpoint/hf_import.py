"""Hugging Face -> Megatron: a torch_dist checkpoint, written layer by layer, without a model."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_infifpo.checkpoint import torch_dist
from megatron_infifpo.checkpoint.layout import (
    HF_FOLDER,
    TRACKER,
    carry,
    check_free,
    new_folder,
    write_dtype,
)
from megatron_infifpo.checkpoint.mapping import Row, WeightMapping
from megatron_infifpo.checkpoint.safetensors_io import HfWeights, check_weights
from megatron_infifpo.models.architecture import read_hf_config
from megatron_infifpo.models.families import megatron_args, weight_mapping


def import_checkpoint(
    hf_dir: str | Path, save_dir: str | Path, dtype: torch.dtype | None = None
) -> None:
    """Convert a Hugging Face folder into a Megatron checkpoint.

    Megatron loads `save_dir` as a release with `--load save_dir --finetune --no-load-optim
    --no-load-rng`; `save_dir/hf` carries the configuration and the tokenizer. One tensor of one
    layer is in memory at a time.

    Args:
        hf_dir: config.json, safetensors, tokenizer files.
        save_dir: must not exist, or be empty.
        dtype: of the Megatron weights; default: that of the Hugging Face weights.

    Raises:
        UserError: an unsupported model, tensors that do not fit config.json, or nowhere to write.
    """
    check_free(save_dir)
    weights = HfWeights(hf_dir)
    config = read_hf_config(hf_dir)
    mapping = weight_mapping(config)
    original = check_weights(weights, mapping)
    dtype = dtype or original
    count = sum(mapping.num_layers if row.per_layer else 1 for row in mapping.rows.values())
    with new_folder(save_dir) as folder, tqdm(total=count, unit="tensor", desc="import") as bar:
        tensors = {
            row.key: _lazy_tensor(row, mapping, weights, dtype, bar)
            for row in mapping.rows.values()
        }
        release = folder / "release"
        release.mkdir()
        torch_dist.write(
            release, tensors, mapping.extra_state_keys, common_state(megatron_args(config))
        )
        carry(Path(hf_dir), folder / HF_FOLDER)
        # Export goes back to the dtype of the weights, whatever config.json says about them.
        write_dtype(folder / HF_FOLDER / "config.json", original)
        (folder / TRACKER).write_text("release", encoding="utf-8")


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
    row: Row, mapping: WeightMapping, weights: HfWeights, dtype: torch.dtype, bar: tqdm
) -> torch_dist.LazyTensor:
    shape = mapping.entry(row.key).shape
    rest = (0,) * len(shape)

    def load(offset: tuple[int, ...]) -> Tensor:
        entry = mapping.entry(row.key, offset[0] if row.per_layer else None)
        tensor = entry.to_megatron([weights.load(name) for name in entry.hf_names]).to(dtype)
        bar.update()
        # A contiguous tensor of its own: the file's mapping is larger than what is written.
        return tensor.unsqueeze(0).contiguous() if row.per_layer else tensor.contiguous()

    if row.per_layer:
        offsets = [(layer, *rest) for layer in range(mapping.num_layers)]
        whole, chunk = (mapping.num_layers, *shape), (1, *shape)
        return torch_dist.LazyTensor(whole, offsets, chunk, dtype, load)
    return torch_dist.LazyTensor(shape, [rest], shape, dtype, load)
