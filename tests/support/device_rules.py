"""What CUDA refuses, or waits for, and the `meta` device, which stands for it, does not notice."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")


class CudaRules(TorchDispatchMode):
    """Raise where a kernel is given tensors of two devices, or a product two data types.

    A scalar on the CPU may go into any kernel: it becomes an argument of the launch.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _PRODUCTS:
            _check_product(func, args, kwargs.get("out"))
        result = func(*args, **kwargs)
        tensors = [*_tensors((args, kwargs)), *_tensors(result)]
        devices = {x.device.type for x in tensors if x.dim() or x.is_meta}
        assert len(devices) <= 1, f"{func} has tensors on {sorted(devices)}"
        return result


class NoConstants(TorchFunctionMode):
    """Raise where Python numbers become a tensor on the device: a copy that the host waits for."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            assert not result.is_meta, f"a constant is copied to the device: {args}"
        return result


class CudaMeansMeta(TorchFunctionMode):
    """Put on `meta` what is meant for CUDA."""

    def __enter__(self) -> "CudaMeansMeta":
        cuda: Any = torch.cuda
        self.device = cuda.current_device
        cuda.current_device = lambda: torch.device("meta")
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.cuda.current_device = self.device
        super().__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _check_product(func: Any, args: tuple, out: Tensor | None) -> None:
    """Check types as the checks of PyTorch's cuBLAS calls do: they have no say on `meta`."""
    *total, left, right = _tensors(args)
    named = [value for value in args if isinstance(value, torch.dtype)]
    wanted = named[0] if named else left.dtype
    assert left.dtype == right.dtype, f"{func} of {left.dtype} and {right.dtype}"
    half = left.dtype in (torch.bfloat16, torch.float16)
    assert wanted == left.dtype or (half and wanted == torch.float32), f"{func} to {wanted}"
    assert all(x.dtype in (wanted, left.dtype) for x in total), f"{func} adds to {total[0].dtype}"
    assert out is None or out.dtype == wanted, f"{func} writes {wanted} into {out.dtype}"
