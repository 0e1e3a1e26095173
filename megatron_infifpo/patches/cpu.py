"""Megatron on a CPU: make its CUDA calls act on the CPU, over gloo, where there is no GPU.

Megatron 0.19 assumes CUDA in some forty places (`device="cuda"`, `torch.cuda.current_device()`).
With these stand-ins the code that runs in production runs unchanged on a laptop and in CI. Where
CUDA works there are none. Needless once Megatron runs on a device that its user names.

Call `enable()` before the first import of `megatron`.
"""

import collections
import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import imports
from megatron_infifpo.ranks import rank

# There where NVIDIA's driver is, whether or not this PyTorch can use it.
DRIVER = Path("/dev/nvidiactl")
# What Megatron would take its optimizer and layers from, which run on GPUs only.
GPU_ONLY = ("transformer_engine", "apex")

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

    Raises:
        UserError: there is a GPU's driver, but CUDA does not work and nobody asked for the CPU; or
            a Transformer Engine that is installed and does not import.
    """
    global _mode
    # Megatron refuses tensor parallelism without it on GPUs before Blackwell; set here because it
    # must be there before CUDA starts. Whoever sets another value keeps it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if _mode is not None:
        return True
    if torch.cuda.is_available():
        before_megatron()
        return False
    _refuse_an_unused_gpu()
    _compile_nothing()
    before_megatron()
    _keep_freed_memory()
    _patch_torch_cuda()
    _mode = _CudaMeansCpu()
    _mode.__enter__()
    _patch_megatron()
    if announce and rank() == 0:
        print("megatron_infifpo: no CUDA device: Megatron runs on the CPU (gloo)", file=sys.stderr)
    return True


def before_megatron() -> None:
    """Import Megatron; idempotent, and enough for who does not run a model.

    Megatron imports Transformer Engine and Apex where they are, and bears no other failure than
    ImportError. Where there is no GPU they are hidden from it, and PyTorch's compiler with them.

    Raises:
        UserError: Transformer Engine is installed on a machine with a GPU, and does not import.
    """
    if _mode is None and torch.cuda.is_available():
        _check_transformer_engine()
    else:
        for package in GPU_ONLY:
            sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # as if not installed
        imports.import_no_compiler()
    if "megatron.core" not in sys.modules:
        imports.import_when_used("wandb")
        imports.import_for_good("megatron.core")


def _refuse_an_unused_gpu() -> None:
    """Refuse to train on the CPU by mistake, which looks like a run that does not start."""
    if not DRIVER.exists() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return
    raise UserError(
        f"this machine has an NVIDIA driver ({DRIVER}), but PyTorch {torch.__version__}, made for "
        f"CUDA {torch.version.cuda}, finds no GPU: is the driver older than that CUDA, or has this "
        "job no GPU? docs/clusters.md says which PyTorch goes with which driver; to run on the CPU "
        "set CUDA_VISIBLE_DEVICES to nothing"
    )


def _check_transformer_engine() -> None:
    """Import it as Megatron will, which takes an ImportError for "not installed"."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # whatever a broken installation does
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise UserError(
            f"Transformer Engine is installed but does not import ({type(error).__name__}: "
            f"{reason}): install transformer-engine[pytorch] for this PyTorch and CUDA, or "
            "uninstall it to train on Megatron's local layers"
        ) from error


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
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "cpu"}
        if kwargs.get("pin_memory"):  # for a copy to CUDA; only its driver can pin
            kwargs = {**kwargs, "pin_memory": False}
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

    def record_event(self, event=None):
        return event or _Event()

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass


class _Event:
    """A point of such a stream, which is always past."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass


class _DeviceProperties:
    name = "cpu"
    major, minor = 8, 0
    multi_processor_count = os.cpu_count() or 1
    total_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _compile_nothing() -> None:
    """Let functions run as they are: Megatron's torch.compile gains nothing, and costs minutes.

    What it compiles for routers fails here, as it looks for a GPU.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    config = sys.modules.get("torch._dynamo.config")
    if config is not None:  # it has read the variable
        config.disable = os.environ["TORCHDYNAMO_DISABLE"] == "1"  # type: ignore[attr-defined]


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
    cuda.Event = _Event
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
    import megatron.core.tensor_parallel.random as rng

    rng_module: Any = rng
    rng_module._get_cuda_rng_state = lambda *args, **kwargs: torch.cuda.get_rng_state()
    rng_module._set_cuda_rng_state = lambda state, *args, **kwargs: torch.cuda.set_rng_state(state)

    import megatron.core.transformer.moe.token_dispatcher as dispatcher

    dispatcher_module: Any = dispatcher
    dispatcher_module.maybe_move_tensor_to_cpu = _as_on_the_host


def _as_on_the_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """What Megatron makes of numbers that the host is to know: it asks whether they are on CUDA."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
