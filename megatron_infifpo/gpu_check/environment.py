"""Group 1: driver, PyTorch, the packages that GPUs bring into play, and a product on every GPU."""

import importlib
import os
import platform
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo import __version__
from megatron_infifpo.engine.environment import DRIVER, driver_version, installed, version
from megatron_infifpo.gpu_check.records import FAILED, PASSED, Options, Recorder, first_line

# Distributions that decide what runs. They are looked up and not imported: one may be broken.
PACKAGES = (
    "torch", "megatron-core", "transformer-engine", "apex", "flash-attn", "triton", "transformers",
    "numpy", "nvidia-resiliency-ext", "trl", "liger-kernel", "accelerate",
)  # fmt: skip


def check(options: Options, record: Recorder) -> dict[str, Any]:
    """Check the machine.

    Returns:
        unusable: why CUDA cannot be used, or None; devices: GPUs, or cores of a CPU; facts: what
        the report says of the machine.
    """
    why = cuda_problem() if options.cuda else None
    found = facts(options.cuda and why is None)
    if why is not None:
        record.add("CUDA", FAILED, note=why)
        return {"unusable": why, "devices": 0, "facts": found}
    devices = torch.cuda.device_count() if options.cuda else os.cpu_count() or 1
    for index in range(devices if options.cuda else 1):
        device = f"cuda:{index}" if options.cuda else "cpu"
        with record.check(f"product on {device}", 1e-12, unit="relative") as result:
            result.value = product_error(device)
    if not options.cuda:
        record.skip("Transformer Engine", "it runs on GPUs only")
        record.skip("Apex", "it runs on GPUs only")
    else:
        check_import(
            record, "Transformer Engine", "transformer_engine", "transformer_engine.pytorch"
        )
        check_import(record, "Apex", "apex", "apex.optimizers")
    check_compiler(record)
    return {"unusable": None, "devices": devices, "facts": found}


def cuda_problem() -> str | None:
    """Say why CUDA cannot be used; None where it can."""
    if torch.version.cuda is None:
        return (
            f"this PyTorch ({torch.__version__}) is made without CUDA: install one that is made "
            "for your driver (docs/clusters.md)"
        )
    driver = driver_version()
    try:
        torch.cuda.init()
        torch.ones(8, device="cuda").sum().item()
    except Exception as error:
        where = f"driver: {driver}" if driver else f"{DRIVER} is missing: no NVIDIA driver here"
        return (
            f"CUDA cannot be used: {first_line(error)} ({where}; PyTorch {torch.__version__} is "
            f"made for CUDA {torch.version.cuda}; docs/clusters.md says which PyTorch goes with "
            "which driver)"
        )
    return None


def facts(cuda: bool) -> dict[str, Any]:
    """Return what a reader of the report needs to know of the machine."""
    found: dict[str, Any] = {
        "megatron_infifpo": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "torch.version.cuda": torch.version.cuda,
        "driver": driver_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    if cuda:
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        free, total = torch.cuda.mem_get_info()
        found |= {
            "devices": names,
            "memory_mib": total // 2**20,
            "free_mib": free // 2**20,
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def product_error(device: str) -> float:
    """Relative error of a float64 product of whole numbers, and of sums over it."""
    a = torch.arange(256 * 256, dtype=torch.float64, device=device).view(256, 256).remainder_(251)
    expected = a.cpu() @ a.cpu().t()
    got = (a @ a.t()).cpu()
    return float((got - expected).abs().max() / expected.abs().max())


def check_import(record: Recorder, name: str, package: str, module: str) -> None:
    """Import a package as Megatron will: missing is fine, broken is not."""
    if not installed(package):
        record.skip(name, "not installed")
        return
    with record.check(name) as result:
        importlib.import_module(module)
        result.note = str(getattr(sys.modules[package], "__version__", "no version"))


def check_compiler(record: Recorder) -> None:
    """Look for what compiles Triton's launchers, which Liger and torch.compile need."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler and header.is_file():
        record.add("C compiler", PASSED, note=compiler)
        return
    missing = [name for name, there in (("gcc", compiler), (header, header.is_file())) if not there]
    needs = "Triton kernels of peers need it; this program does not"
    record.skip("C compiler", f"no {' and no '.join(map(str, missing))}: {needs}")
