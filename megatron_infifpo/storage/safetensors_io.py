"""Read and write safetensors files tensor by tensor, through a buffer and not a mapped file.

A mapped file counts as resident memory, and all of a checkpoint would be mapped in the end; here
memory holds the tensors that are asked for. Headers are checked before anything is believed.
Format: 8 bytes length, a JSON header of dtypes, shapes and offsets, then the data.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.errors import UserError

# The format's names of the dtypes that weights may have.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bits of other elements, to check headers. Tensors of these are only ever read as bytes.
_OTHER_BITS = {"C64": 64, "F64": 64, "I64": 64, "U64": 64, "I32": 32, "U32": 32, "I16": 16}
_OTHER_BITS |= {"U16": 16, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
_OTHER_BITS |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
_MAX_HEADER = 100_000_000  # as the safetensors library has it


class SafetensorsFile:
    """One file; `shapes` and `dtypes` (the format's names) are those of its header."""

    def __init__(self, path: Path):
        """Read and check the header.

        Raises:
            UserError: no such file, or not a whole safetensors file.
        """
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._begins: dict[str, int] = {}
        self._sizes: dict[str, int] = {}
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER):
                    raise ValueError(f"its header would have {length} bytes, the file has {size}")
                header = json.loads(file.read(length))
            self._take(header, 8 + length, size)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path}: {error}; copy the file again") from None

    def _take(self, header: Any, start: int, size: int) -> None:
        """Check the header: tensors lie side by side and fill the file."""
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        spans = []
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
                bits = 8 * DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_BITS[dtype]
                numbers = [*shape, begin, end]
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"tensor {name} has the entry {str(entry)[:80]}") from None
            if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                raise ValueError(f"tensor {name} has the entry {str(entry)[:80]}")
            if 8 * (end - begin) != math.prod(shape) * bits:
                raise ValueError(f"tensor {name} of shape {shape} has {end - begin} bytes")
            spans.append((begin, end, name))
            self.shapes[name], self.dtypes[name] = tuple(shape), dtype
            self._begins[name], self._sizes[name] = start + begin, end - begin
        position = 0
        for begin, end, name in sorted(spans):
            if begin != position:
                raise ValueError(f"tensor {name} begins at byte {begin}, expected {position}")
            position = end
        if start + position != size:
            raise ValueError(f"it has {size} bytes, its header says {start + position}")

    def read_bytes(self, name: str) -> Tensor:
        """Return the bytes of a tensor of any dtype, uint8 `[nbytes]`."""
        content = torch.empty(self._sizes[name], dtype=torch.uint8)
        read_into(self.path, self._begins[name], content)
        return content

    def read(self, name: str, scratch: "Scratch | None" = None) -> Tensor:
        """Return a tensor, in memory of its own or in the scratch memory."""
        shape, dtype = self.shapes[name], DTYPES[self.dtypes[name]]
        tensor = torch.empty(shape, dtype=dtype) if scratch is None else scratch.take(shape, dtype)
        read_into(self.path, self._begins[name], tensor)
        return tensor


class Scratch:
    """Memory that is used again and again: to get fresh pages takes longer than to fill them."""

    def __init__(self) -> None:
        """Start with none."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._used = 0

    def clear(self) -> None:
        """Give the memory free: what was taken before must not be looked at any more."""
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of unknown values, with a storage of just its size."""
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        if self._used + size > len(self._memory):
            # Tensors that are in use keep the old memory alive.
            self._memory, self._used = mmap.mmap(-1, size), 0
        tensor = torch.frombuffer(self._memory, dtype=torch.uint8, count=size, offset=self._used)
        self._used += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        return tensor.view(dtype).view(shape)


def read_into(path: Path, begin: int, tensor: Tensor) -> None:
    """Fill a contiguous tensor with the bytes of a file from `begin` on.

    Raises:
        UserError: the file cannot be read, or is too short.
    """
    view = memoryview(bytes_of(tensor).numpy())
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(begin)
            while view:
                count = file.readinto(view)
                if not count:
                    raise EOFError("it is shorter than its index says")
                view = view[count:]
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


class SafetensorsWriter:
    """A file of tensors whose shapes are known before their values; written in any order.

    Tensors are laid out by name, as the safetensors library does it. Use as a context manager.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        """Write the header."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._begins: dict[str, int] = {}
        position = 0
        for name in sorted(shapes):
            end = position + math.prod(shapes[name]) * dtype.itemsize
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [position, end],
            }
            self._begins[name], position = position, end
        self.shapes, self.dtype = dict(shapes), dtype
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._missing = set(shapes)
        self._file = open(path, "wb", buffering=0)
        _write(self._file, memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, converted to the file's dtype."""
        assert tuple(tensor.shape) == self.shapes[name], f"{name}: {list(tensor.shape)}"
        tensor = tensor.to(self.dtype).contiguous()
        self._file.seek(self._start + self._begins[name])
        _write(self._file, memoryview(bytes_of(tensor).numpy()))
        self._missing.discard(name)

    def __enter__(self) -> "SafetensorsWriter":
        """Return the writer."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file, which must be complete and on the disk unless something failed."""
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()
        assert kind is not None or not self._missing, f"not written: {sorted(self._missing)}"


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, uint8 `[nbytes]`, sharing its memory."""
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0).byte()


def _write(file: Any, view: memoryview) -> None:
    """Write all of it: one call of an unbuffered file may write less."""
    while view:
        view = view[file.write(view) :]
