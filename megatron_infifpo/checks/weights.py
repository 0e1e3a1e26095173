"""Compare the weights of a Megatron checkpoint with those of its Hugging Face model."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_infifpo.convert.hf_export import hf_tensors
from megatron_infifpo.convert.hf_folder import open_hf
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.storage.safetensors_io import bytes_of


def worst_tensor(
    hf_dir: str | Path, load_dir: str | Path, architecture: str | Path | None = None
) -> str:
    """Compare the weights themselves, as Hugging Face names them; a sentence about the worst.

    Args:
        hf_dir, load_dir: Hugging Face folder and Megatron checkpoint.
        architecture: of a checkpoint that carries no config.json, the folder that has it.
    """
    weights, mapping, _ = open_hf(hf_dir)
    opened, _, _ = open_checkpoint(load_dir, hf=architecture)
    worst, where = 0.0, ""
    for group in hf_tensors(opened, mapping):
        for name, ours in group.items():
            relative = _gap(weights.load(name), ours)
            if not relative <= worst:  # NaN is the worst of all
                worst, where = relative, name
    if not where:
        return "all weights are equal to the bit"
    return f"the weights that differ most: {where}, by {worst:.1e} of its largest value"


def _gap(theirs: Tensor, ours: Tensor) -> float:
    """Largest difference, as a share of the largest value; 0 exactly where the bytes are equal."""
    if theirs.dtype == ours.dtype and torch.equal(bytes_of(theirs), bytes_of(ours.contiguous())):
        return 0.0
    largest = largest_gap = torch.zeros(())
    # By parts: a float32 copy of an embedding is as large as the model's largest tensors together.
    for a, b in zip(theirs.split(4096), ours.split(4096), strict=True):
        gap = (a.float() - b.float()).abs().nan_to_num(nan=torch.inf).max()
        largest_gap = torch.maximum(largest_gap, gap)
        largest = torch.maximum(largest, a.float().abs().nan_to_num(0.0, 0.0).max())
    # Equal numbers in other bytes: another dtype, or the sign of zero.
    return max(float(largest_gap) / (float(largest) or 1.0), 1e-30)
