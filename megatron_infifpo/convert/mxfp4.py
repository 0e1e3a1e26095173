"""Weights of four bits with a scale for every 32, as gpt-oss is published: read as bfloat16.

OCP Microscaling Formats 1.0: a value is one of FP4's (E2M1) times a power of two. bfloat16 holds
both exactly, so nothing is lost.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.convert.hf_files import HfWeights
from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.safetensors_io import Scratch, bytes_of

BLOCKS, SCALES = "_blocks", "_scales"
# By their four bits: a sign, two bits of an exponent, one of a mantissa.
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)], dtype=torch.bfloat16)
_BIAS = 127  # of a scale's exponent


class Mxfp4Weights(HfWeights):
    """Tensors of a Hugging Face folder; what ends with `BLOCKS` and `SCALES` makes up one.

    Blocks are bytes `[experts, rows, columns / 32, 16]` of two values, the first in the low bits,
    and scales bytes `[experts, rows, columns / 32]`. A tensor is `[experts, columns, rows]`.
    """

    def __init__(self, directory: str | Path, rename: Any = str):
        """Open the folder's safetensors.

        Args:
            directory, rename: as of `HfWeights`.

        Raises:
            UserError: blocks without their scales, the other way round, or shapes that differ.
        """
        super().__init__(directory, rename)
        self._packed = {name.removesuffix(BLOCKS) for name in self._files if name.endswith(BLOCKS)}
        scaled = {name.removesuffix(SCALES) for name in self._files if name.endswith(SCALES)}
        for name in sorted(self._packed ^ scaled):
            which = (BLOCKS, SCALES) if name in self._packed else (SCALES, BLOCKS)
            raise UserError(f"{directory}: tensor {name}{which[0]} has no {name}{which[1]}")
        for name in sorted(self._packed):
            parts = (f"{name}{BLOCKS}", f"{name}{SCALES}")
            blocks, scales = (HfWeights.shape(self, part) for part in parts)
            kinds = {self.content_type(part) for part in parts}
            if len(blocks) != 4 or blocks[3] != 16 or blocks[:3] != scales or kinds != {"U8"}:
                raise UserError(
                    f"{directory}: tensors {name}{BLOCKS} {list(blocks)} and {name}{SCALES} "
                    f"{list(scales)} are no MXFP4: expected bytes, 16 of the former for one of the "
                    "latter"
                )

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        parts = {f"{name}{part}" for name in self._packed for part in (BLOCKS, SCALES)}
        return sorted(self._packed | (self._files.keys() - parts))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if name not in self._packed:
            return super().shape(name)
        experts, rows, groups = super().shape(f"{name}{SCALES}")
        return (experts, 32 * groups, rows)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of what `load` returns."""
        return VALUES.dtype if name in self._packed else super().dtype(name)

    def content(self, name: str) -> tuple[str, Tensor]:
        """Dtype and bytes of what `load` returns."""
        if name not in self._packed:
            return super().content(name)
        return str(VALUES.dtype), bytes_of(self.load(name).contiguous())

    def load(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor."""
        if name not in self._packed:
            return super().load(name, scratch)
        blocks, scales = self._bytes(f"{name}{BLOCKS}"), self._bytes(f"{name}{SCALES}")
        found = torch.empty(*scales.shape, 16, 2, dtype=VALUES.dtype)
        for expert, bits, powers in zip(found, blocks, scales, strict=True):
            factor = torch.ldexp(torch.ones(()), powers.int() - _BIAS).to(VALUES.dtype)
            for place, half in enumerate((bits & 15, bits >> 4)):
                expert[..., place] = VALUES[half.int()] * factor[..., None]
        return found.flatten(2).transpose(1, 2)

    def _bytes(self, name: str) -> Tensor:
        return HfWeights.content(self, name)[1].view(HfWeights.shape(self, name))
