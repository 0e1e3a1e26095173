"""`infifpo environment`: what is installed, and what it changes."""

import argparse
import importlib.metadata
import importlib.util
import inspect
import os
import platform
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo import __version__
from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu

# Distribution -> what it is for.
PACKAGES = {
    "megatron-core": "the model, the train loop, checkpoints",
    "torch": "everything",
    "transformers": "Hugging Face models and tokenizers",
    "transformer-engine": "fused layers, fused Adam, FP8; optional",
    "apex": "fused Adam, fused weight gradients of local layers; optional",
    "nemo-run": "recipes; optional",
    "nvidia-resiliency-ext": "Megatron's default asynchronous checkpoints; optional",
}
DRIVER = Path("/proc/driver/nvidia/version")


class ShowEnvironment(argparse.Action):
    """A flag that prints what is installed and exits, as `--version` does."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print it."""
        print(report())
        parser.exit()


def report(refused: UserError | None = None) -> str:
    """Lines on versions, devices and the path that each part takes; imports Megatron.

    Args:
        refused: why no run can start here. Megatron is not imported then, and no part has a path.
    """
    lines = [f"megatron_infifpo {__version__}, Python {platform.python_version()}"]
    for name, purpose in PACKAGES.items():
        lines.append(f"  {name:<24}{version(name):<16}{purpose}")
    on_cpu = cpu.is_enabled()
    lines.append(f"devices: {devices(on_cpu, refused)}")
    found = {
        "NVIDIA driver": driver_version() or "none",
        "CUDA of this PyTorch": torch.version.cuda or "none",
        "CUDA": "refused: see below" if refused else cuda_state(on_cpu),
    }
    if not refused:
        found |= paths(on_cpu)
    lines += [f"  {part:<24}{path}" for part, path in found.items()]
    return "\n".join(lines)


def devices(on_cpu: bool, refused: UserError | None = None) -> str:
    """Say what a run here would use."""
    if on_cpu:
        return "none; Megatron runs on the CPU, for tests and demos"
    count = torch.cuda.device_count()
    if refused and not count:
        return "none that PyTorch can use"
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    return f"{count} x {', '.join(sorted(names))}"


def paths(on_cpu: bool) -> dict[str, str]:
    """Part -> the implementation that a run here would use."""
    from megatron.core.optimizer import distrib_optimizer

    kinds = {
        f"layers, {name}": LAYERS[_kind(half)]
        for name, half in (("bf16 and fp16", True), ("float32", False))
    }
    fused = distrib_optimizer.HAVE_APEX_OR_TE
    accumulation = "added by the products themselves"
    if _kind(True) == "local" and (on_cpu or not installed("fused_weight_gradient_mlp_cuda")):
        accumulation = "added after them (fused: Transformer Engine's layers, or apex)"
    return kinds | {
        "FP8": "yes" if _kind(True) == "te" else "no: it needs Transformer Engine's layers",
        "attention": attention(on_cpu),
        "FlashAttention-3": flash_attention_3(),
        "shared prompts": "yes, but with --te-attention",
        "Adam": "fused" if fused else "PyTorch's (fused: Transformer Engine or apex)",
        "weight gradients": accumulation,
        "log-prob head": "chunked products, added into Megatron's float32 gradients",
        "collectives": "gloo" if on_cpu else "nccl",
    }


# Kind of layers -> what they are.
LAYERS = {
    "te": "Transformer Engine's, with the attention below",
    "local": "Megatron's local ones, with the attention below",
}


def _kind(half: bool) -> str:
    """Name of the kind of layers that a run gets without a flag about them."""
    from megatron_infifpo.engine.layer_kind import choose_kind

    return choose_kind(half=half).name


def attention(on_cpu: bool) -> str:
    """The kernel of packed rows, and whether PyTorch's has the arguments that it is called with."""
    by_segment = "PyTorch's attention, one call a segment"
    if on_cpu:
        return by_segment
    if not installed("torch.nn.attention.varlen"):
        return f"{by_segment}: PyTorch {torch.__version__} has no varlen_attn, 2.12 has"
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return f"none: varlen_attn of PyTorch {torch.__version__} has no enable_gqa, 2.12's has"
    return f"PyTorch's variable-length flash kernel (float32: {by_segment})"


def flash_attention_3() -> str:
    """Whether FlashAttention-3 runs under PyTorch's kernels, or could."""
    from torch.nn import attention as implementations

    current = getattr(implementations, "current_flash_attention_impl", lambda: None)()
    if current is not None:
        return f"{current} is active"
    return "installed, not activated" if installed("flash_attn_interface") else "not installed"


def cuda_state(on_cpu: bool) -> str:
    """Whether CUDA works in this process, or why it is not used."""
    if not on_cpu:
        return "works"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "hidden by CUDA_VISIBLE_DEVICES"
    return "no GPU" if torch.version.cuda else "not in this PyTorch"


def driver_version() -> str | None:
    """First line of what the NVIDIA driver says of itself; None without one."""
    if not DRIVER.is_file():
        return None
    return DRIVER.read_text(encoding="utf-8").splitlines()[0].partition(":")[2].strip()


def version(name: str) -> str:
    """Version of a distribution, or that it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installed(module: str) -> bool:
    """Whether a module is there; whether it imports is another question."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False
