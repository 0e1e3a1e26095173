"""Weights in FP8 with a scale for each block, as DeepSeek and Qwen publish them: read as numbers.

For sources that Megatron scores. A pivot needs the weights that these were rounded from.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.convert.hf_folder import open_hf
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import family, weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import WeightMapping
from megatron_infifpo.storage.beside import check_quantized
from megatron_infifpo.storage.safetensors_io import Scratch

SCALE = "_scale_inv"
_FP8 = "F8_E4M3"


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, of a config.json whose weights are stored so; else None."""
    how = config.get("quantization_config")
    if not isinstance(how, dict) or how.get("quant_method") != "fp8":
        return None
    size: Any = how.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or any(type(n) is not int for n in size):
        return None
    return (size[0], size[1]) if min(size) > 0 else None


class BlockFp8Weights(HfWeights):
    """Tensors of a Hugging Face folder, those in FP8 times the scales of their blocks."""

    def __init__(self, directory: str | Path, rename: Any, block: tuple[int, int]):
        """Open the folder's safetensors.

        Args:
            directory, rename: as of `HfWeights`.
            block: rows and columns that share a scale.

        Raises:
            UserError: a weight without its scale, or with one of another shape.
        """
        super().__init__(directory, rename)
        self._block = block
        for name in self.names():
            stored = self.content_type(name) == _FP8
            if stored != (f"{name}{SCALE}" in self._files):
                what = "has no scale" if stored else "has a scale, but is not in FP8"
                raise UserError(f"{directory}: tensor {name} {what} ({name}{SCALE})")
            if stored and self.shape(f"{name}{SCALE}") != self._blocks(name):
                raise UserError(
                    f"{directory}: tensor {name}{SCALE} has shape "
                    f"{list(self.shape(f'{name}{SCALE}'))}, expected {list(self._blocks(name))}: "
                    f"a scale for each block of {block[0]} x {block[1]}"
                )

    def names(self) -> list[str]:
        """Names of all tensors but scales, sorted."""
        return [name for name in super().names() if not name.endswith(SCALE)]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of what `load` returns."""
        return torch.float32 if self.content_type(name) == _FP8 else super().dtype(name)

    def load(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor; in float32 if it is in FP8."""
        if self.content_type(name) != _FP8:
            return super().load(name, scratch)
        _, content = self.content(name)
        values = content.view(torch.float8_e4m3fn).view(self.shape(name)).float()
        scales, (rows, columns) = super().load(f"{name}{SCALE}").float(), self._block
        for block, scale in zip(values.split(rows), scales, strict=True):
            block *= scale.repeat_interleave(columns)[: block.shape[1]]
        return values

    def _blocks(self, name: str) -> tuple[int, ...]:
        shape = self.shape(name)
        return tuple(-(-size // block) for size, block in zip(shape, self._block, strict=False))


def scored_config(directory: str | Path) -> dict[str, Any]:
    """Read config.json of a model to be scored: without a quantization that can be undone.

    Raises:
        UserError: as `read_hf_config`.
    """
    config = read_hf_config(directory)
    if block_size(config) is None:
        return config
    return {name: value for name, value in config.items() if name != "quantization_config"}


def open_scored(directory: str | Path) -> tuple[HfWeights, WeightMapping]:
    """Open a folder's weights, those in FP8 as the numbers that they stand for."""
    block = block_size(read_hf_config(directory))
    if block is None:
        weights, mapping, _ = open_hf(directory)
        return weights, mapping
    config = scored_config(directory)
    check_quantized(Path(directory), config)
    return BlockFp8Weights(directory, family(config).hf_name, block), weight_mapping(config)
