"""Count where a training step would make the host wait for a GPU, on the CPU."""

import collections
import contextlib
import functools
import linecache
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Kernels whose result's size, or value, the host must know.
_SIZED = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor")
_READS = ("_local_scalar_dense", "equal")
# Moves to the host as a whole; `.item()` and `bool()` end in the kernel above.
_COPIES = {torch.Tensor.cpu: "cpu", torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy"}
_CONSTANTS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)
# The code whose lines are named, and what is of the host on a GPU, too: PyTorch's Adam counts its
# steps there, and `one_hot` looks at its indices on the CPU only.
_CODE = ("/megatron/", "/megatron_infifpo/", "/transformer_engine/")
_HOST = ("/torch/optim/",)
_HOST_LINES = ("one_hot(",)
# Code of this program that stands between the others and PyTorch.
_BETWEEN = (
    "/megatron_infifpo/patches/cpu.py",
    "/megatron_infifpo/bench/jobs.py",
    "/megatron_infifpo/gpu_check/",
)

Counts = collections.Counter[str]


class _Kernels(TorchDispatchMode):
    """Counts kernels after which the host must know a size or a value."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.").removesuffix(".default")
        if name.split(".")[0] in _READS or name in _SIZED:
            _note(self.counts, "wait")
        if name == "index.Tensor" and any(_is_mask(index) for index in args[1]):
            _note(self.counts, "wait")
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    """Counts copies of whole tensors, and constants."""

    def __init__(self, counts: Counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES or (func is torch.Tensor.to and "cpu" in args[1:]):
            _note(self.counts, "wait")
        if func in _CONSTANTS and (func is torch.Tensor.new_tensor or kwargs.get("device")):
            _note(self.counts, "constant")
        return func(*args, **kwargs)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _note(counts: Counts, kind: str) -> None:
    """Count by the innermost line of Megatron, Transformer Engine or this program."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if any(part in path for part in _HOST):
            return
        if any(part in path for part in _CODE) and not any(part in path for part in _BETWEEN):
            break
        frame = frame.f_back
    assert frame is not None
    if any(text in _source(frame) for text in _HOST_LINES):
        return
    counts[f"{kind} {Path(path).stem}.{frame.f_code.co_name}"] += 1


def _source(frame: Any) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno)


@contextlib.contextmanager
def counting(counts: Counts) -> Iterator[None]:
    """Count what happens within, as `wait FILE.FUNCTION` and `constant FILE.FUNCTION`."""
    with _Kernels(counts), _Functions(counts):
        yield


def counted(counts: Counts, function: Any) -> Any:
    """Wrap a function: count what happens inside of it."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with counting(counts):
            return function(*args, **kwargs)

    return run
