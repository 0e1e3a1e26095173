"""`python -m megatron_infifpo.train --environment`: what is installed, and what it changes."""

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.optimizer import distrib_optimizer

from megatron_infifpo import __version__, cpu

# Distribution -> what it is for.
PACKAGES = {
    "megatron-core": "the model, the train loop, checkpoints",
    "torch": "everything",
    "transformers": "Hugging Face models and tokenizers",
    "transformer-engine": "fused layers, fused Adam, FP8; optional",
    "apex": "fused Adam and gradient accumulation; optional",
    "nemo-run": "recipes; optional",
    "nvidia-resiliency-ext": "Megatron's default asynchronous checkpoints; optional",
}


class ShowEnvironment(argparse.Action):
    """Print the report and exit, as `--version` does."""

    def __init__(self, **options: Any) -> None:
        """Take no value."""
        super().__init__(nargs=0, **options)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        """Print and exit."""
        print(report())
        parser.exit()


def report() -> str:
    """Lines on versions, devices and the path that each part takes."""
    lines = [f"megatron_infifpo {__version__}, Python {platform.python_version()}"]
    for name, purpose in PACKAGES.items():
        lines.append(f"  {name:<24}{version(name):<16}{purpose}")
    on_cpu = cpu.is_enabled()
    if on_cpu:
        lines.append("devices: none; Megatron runs on the CPU, for tests and demos")
    else:
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        lines.append(f"devices: {torch.cuda.device_count()} x {', '.join(sorted(names))}")
    lines += [f"  {part:<24}{path}" for part, path in paths(on_cpu).items()]
    return "\n".join(lines)


def paths(on_cpu: bool) -> dict[str, str]:
    """Part -> the implementation that a run here would use."""
    packed = "PyTorch's attention, one call a segment"
    if not on_cpu:
        packed = "PyTorch's variable-length flash kernel (float32: one call a segment)"
    fused_adam = distrib_optimizer.HAVE_APEX_OR_TE
    fusion = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") and not on_cpu
    accumulation = "added by the product itself" if fusion else "added apart (fused: apex)"
    return {
        "layers, bf16 and fp16": "Transformer Engine" if HAVE_TE else f"local; {packed}",
        "layers, float32": f"local; {packed}",
        "shared prompts": "local layers only" if HAVE_TE else "yes",
        "Adam": "fused" if fused_adam else "PyTorch's (fused: Transformer Engine or apex)",
        "weight gradients": accumulation,
        "log-prob head": "chunked products, added into Megatron's float32 gradients",
        "collectives": "gloo" if on_cpu else "nccl",
    }


def version(name: str) -> str:
    """Version of a distribution, or that it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
