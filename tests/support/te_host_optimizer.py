"""Megatron's optimizer whose state is partly on the host, on a CPU.

It asks every parameter whether it is on a GPU, copies those it takes to the host into pinned
memory, and orders the copies by events of streams.
"""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from support.te_emulation import IS_CUDA

STEPS: list[dict[str, Any]] = []
"""`counts` after every step of a `HybridDeviceOptimizer` in this process."""


class _Event:
    """An event that has happened."""

    def wait(self, stream: Any = None) -> None:
        """Wait for nothing."""

    def synchronize(self) -> None:
        """Wait for nothing."""


class _Places(TorchFunctionMode):
    """Tensors are on the GPU unless they, or what they were made from, were moved to the host."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == IS_CUDA.__get__:
            return not hasattr(args[0], "on_host")
        result = func(*args, **(kwargs or {}))
        moved = func is Tensor.cpu or (args and hasattr(args[0], "on_host"))
        if moved and isinstance(result, Tensor):
            result.on_host = True  # type: ignore[attr-defined]
        return result


def stand_in() -> None:
    """Let `HybridDeviceOptimizer` split parameters as on a GPU, and record its steps."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    stream: Any = torch.cuda.Stream
    stream.record_event = lambda self: _Event()
    split, step = HybridDeviceOptimizer._get_sub_optimizer_param_groups, HybridDeviceOptimizer.step

    def split_by_place(self: Any, fraction: float) -> Any:
        with _Places():
            return split(self, fraction)

    def recorded(self: Any, closure: Any = None) -> None:
        step(self, closure)
        STEPS.append(counts(self))

    HybridDeviceOptimizer._get_sub_optimizer_param_groups = split_by_place
    HybridDeviceOptimizer.step = recorded


def counts(optimizer: Any) -> dict[str, Any]:
    """Values on either side, and what the optimizers of either side take for the step's number."""
    host = [state for part in optimizer.cpu_optimizers for state in part.state.items()]
    device = optimizer.gpu_optimizer.param_groups if optimizer.gpu_optimizer else []
    return {
        "host": sum(parameter.numel() for parameter, _ in host),
        "device": sum(parameter.numel() for group in device for parameter in group["params"]),
        "host steps": {float(state["step"]) for _, state in host},
        "device steps": {float(group["step"]) for group in device},
    }


def held(models: Any, optimizer: Any) -> dict[str, int]:
    """Bytes that an optimizer holds on either side beside the model, and the model's parameters.

    Gradients on the GPU are the model's; what is on the host has its own there. `moved`: bytes that
    a step copies to the host, gradients, and into the GPU's parameters.
    """
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    own = {parameter.data_ptr() for model in models for parameter in model.parameters()}
    (outer,) = getattr(optimizer, "chained_optimizers", [optimizer])
    inner = outer.optimizer
    found: dict[str, dict[int, int]] = {"device": {}, "host": {}}
    parts = [("device", inner)]
    if isinstance(inner, HybridDeviceOptimizer):
        parts = [("host", part) for part in inner.cpu_optimizers]
        parts += [("device", inner.gpu_optimizer)] if inner.gpu_optimizer else []
        found["host"] = {x.data_ptr(): x.nbytes for x in inner.cpu_copy_map_grad.values()}
    moved = sum(found["host"].values())
    for part in getattr(inner, "cpu_optimizers", []):
        copies = [parameter for group in part.param_groups for parameter in group["params"]]
        moved += sum(inner.cpu_copys_map_gpu_param[copy].nbytes for copy in copies)
    for place, part in parts:
        tensors = [parameter.data for group in part.param_groups for parameter in group["params"]]
        tensors += [x for state in part.state.values() for x in state.values()]
        found[place] |= {
            x.data_ptr(): x.nbytes
            for x in tensors
            if torch.is_tensor(x) and x.dim() and x.data_ptr() not in own
        }
    count = sum(parameter.numel() for model in models for parameter in model.parameters())
    return {place: sum(sizes.values()) for place, sizes in found.items()} | {
        "parameters": count,
        "moved": moved,
    }
