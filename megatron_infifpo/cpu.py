"""Megatron on a CPU: make its CUDA calls act on the CPU, over gloo, where there is no GPU.

Megatron assumes CUDA in some forty places (`device="cuda"`, `torch.cuda.current_device()`, ...).
With these stand-ins the code that runs in production runs unchanged on a laptop and in CI. This is
the only file that patches anything, and it does nothing where CUDA works.

Call `enable()` before the first import of `megatron`.
"""

import collections
import contextlib
import ctypes
import os
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_mode: "_CudaMeansCpu | None" = None


def device() -> str:
    """Where models of transformers go: "cpu" where CUDA is missing or stood in for, else "cuda"."""
    return "cuda" if torch.cuda.is_available() and not is_enabled() else "cpu"


def is_enabled() -> bool:
    """Whether this process trains on the CPU."""
    return _mode is not None


def enable(*, announce: bool = True) -> bool:
    """Install the stand-ins, unless CUDA is available; idempotent.

    Args:
        announce: say so in one line on stderr, from rank 0.

    Returns:
        Whether Megatron now runs on the CPU.
    """
    global _mode
    # Megatron refuses tensor parallelism without it on GPUs before Blackwell; set here because it
    # must be there before CUDA starts. Whoever sets another value keeps it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if _mode is not None:
        return True
    if torch.cuda.is_available():
        return False
    # Megatron decorates functions with torch.compile, which gains nothing here and costs minutes.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    _keep_freed_memory()
    _patch_torch_cuda()
    _mode = _CudaMeansCpu()
    _mode.__enter__()
    _patch_megatron()
    if announce and os.environ.get("RANK", "0") == "0":
        print("megatron_infifpo: no CUDA device: Megatron runs on the CPU (gloo)", file=sys.stderr)
    return True


def argument_overrides() -> dict[str, Any]:
    """Megatron arguments that a CPU run needs: gloo, and no fused CUDA kernels."""
    return {
        "distributed_backend": "gloo",
        "use_cpu_initialization": True,
        "num_workers": 0,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_gelu_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "no_persist_layer_norm": True,
    }


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _CudaMeansCpu(TorchFunctionMode):
    """Redirect tensor creation and moves from CUDA to the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if func is torch.Tensor.to:
            args = tuple("cpu" if _is_cuda(a) else a for a in args)
        if func is torch.Tensor.type and len(args) == 1 and "dtype" not in kwargs:
            # The optimizer picks its parameters by names such as torch.cuda.FloatTensor.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


class _Stream:
    """A stream on which everything is already done. A class: others annotate with it."""

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class _DeviceProperties:
    name = "cpu"
    major, minor = 8, 0
    multi_processor_count = os.cpu_count() or 1
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _keep_freed_memory() -> None:
    """Reuse memory instead of returning it: a step's page faults cost a tenth of its time."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch: large tensors in huge pages
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        mallopt(trim_threshold, -1)  # never
        mallopt(mmap_max, 0)


def _patch_torch_cuda() -> None:
    # The "GPU" generator is one of its own, so that using it never disturbs the CPU's generator.
    generator = torch.Generator()
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: torch.device("cpu")
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream = _Stream
    cuda.current_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = generator.manual_seed
    cuda.get_rng_state = lambda device=None: generator.get_state()
    cuda.set_rng_state = lambda state, device=None: generator.set_state(state)
    cuda.get_device_properties = lambda device=None: _DeviceProperties
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: "cpu"
    for counter in ("memory_allocated", "memory_reserved"):
        setattr(cuda, counter, lambda device=None: 0)
        setattr(cuda, f"max_{counter}", lambda device=None: 0)
    cuda.memory_stats = lambda device=None: collections.defaultdict(int)
    cuda.reset_peak_memory_stats = lambda device=None: None
    # Data loaders would pin memory for an accelerator.
    torch.accelerator.is_available = lambda: False


def _patch_megatron() -> None:
    import megatron.core.datasets.utils as dataset_utils
    import megatron.core.tensor_parallel.random as rng

    rng_module: Any = rng
    rng_module._get_cuda_rng_state = lambda *args, **kwargs: torch.cuda.get_rng_state()
    rng_module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.cuda.set_rng_state(state)
    # The wheel has no Makefile for the helpers of its own datasets, which we do not use.
    dataset_utils.compile_helpers = lambda: None
