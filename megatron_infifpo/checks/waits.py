"""Group 7: where the host waits for the GPU in a training step.

A GPU says so itself (`torch.cuda.set_sync_debug_mode`). On a CPU, where nothing waits, what would
is counted: a value that is read off a tensor, a tensor that is moved to the host, and a tensor that
is made of Python numbers on the device, which is a copy from memory that is not pinned. Lists made
of tensors are not: most of those lie on the host.
"""

import collections
import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_infifpo.bench import recorded_training, training_flags
from megatron_infifpo.checks import processes
from megatron_infifpo.checks.jobs import SMALL, prepare
from megatron_infifpo.checks.records import Options, Recorder

FAMILIES = ("llama", "gemma3")
STEPS, MICRO_BATCHES, PAIRS = 3, 4, 2
ALLOWED = 1.0  # a step: the one look for log-probs that are not finite
SHOWN = 3
# Code whose lines are shown, and what stands between it and PyTorch.
CODE = ("/megatron_infifpo/", "/megatron/")
HERE = ("/checks/waits.py", "/cpu.py", "/bench.py")


class Waits:
    """Host waits by line, `inside` of a micro-batch's forward and backward pass and `outside`."""

    def __init__(self, cuda: bool):
        """Take whether a GPU is asked."""
        self.cuda = cuda
        self.inside: collections.Counter[str] = collections.Counter()
        self.outside: collections.Counter[str] = collections.Counter()
        self.micro_batches = 0
        self.depth = 0
        self.muted = 0

    def add(self, line: str) -> None:
        """Count a wait at a line."""
        if not self.muted:
            (self.inside if self.depth else self.outside)[line] += 1

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count what happens within."""
        if not self.cuda:
            with _Reads(self), _Constants(self):
                yield
            return

        def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
            if "synchronizing CUDA operation" in str(message):
                self.add(f"{_short(filename)}:{lineno} <- {calling_line()}")

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Mark what is part of a forward or backward pass."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class _Reads(TorchDispatchMode):
    """Counts values read off tensors."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func):
            self.waits.add(f"read at {calling_line()}")
        return func(*args, **(kwargs or {}))


class _Constants(TorchFunctionMode):
    """Counts tensors made of Python numbers on the device, and whole tensors that are read."""

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        placed = func is torch.tensor and (kwargs or {}).get("device") is not None
        if placed or func is torch.Tensor.new_tensor:
            self.waits.add(f"constant at {calling_line()}")
        if func is torch.Tensor.cpu:
            self.waits.add(f"read at {calling_line()}")
        # It looks at its values on a CPU only.
        only_here = func is torch.nn.functional.one_hot
        self.waits.muted += only_here
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.waits.muted -= only_here


def calling_line() -> str:
    """Innermost line of the program's own code, or of Megatron's."""
    for frame in reversed(traceback.extract_stack()):
        ours = not frame.filename.endswith(HERE)
        if ours and any(part in frame.filename for part in CODE):
            return f"{_short(frame.filename)}:{frame.lineno}"
    return "elsewhere"


def _short(filename: str) -> str:
    return "/".join(Path(filename).parts[-3:])


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and count waits after the first step.

    Args:
        argument: argv, flags of training; cuda, whether a GPU is asked.

    Returns:
        micro_batches of the counted steps; inside and outside, counts by line.
    """
    import megatron_infifpo.train  # noqa: F401  (readies Megatron for the CPU)
    import megatron.core.pipeline_parallel.schedules as schedules  # isort: skip
    import megatron.training.training as loop  # isort: skip

    waits, steps = Waits(argument["cuda"]), [0]
    forward, backward, train_step = schedules.forward_step, schedules.backward_step, loop.train_step

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        waits.micro_batches += steps[0] > 1
        with waits.micro_batch():
            return forward(*args, **kwargs)

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        with waits.micro_batch():
            return backward(*args, **kwargs)

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        with waits.counted() if steps[0] > 1 else contextlib.nullcontext():
            return train_step(*args, **kwargs)

    schedules.forward_step, schedules.backward_step = counted_forward, counted_backward
    loop.train_step = counted_step
    recorded_training(argument["argv"])
    return {
        "micro_batches": waits.micro_batches,
        "inside": dict(waits.inside.most_common()),
        "outside": dict(waits.outside.most_common()),
    }


def check(options: Options, record: Recorder) -> None:
    """Count for some families, with the layers that are chosen by default."""
    for family in FAMILIES[:1] if options.quick else FAMILIES:
        folder = Path(options.folder) / family
        prepare(folder, family)
        argv = [*training_flags(folder, STEPS), *SMALL, "--lr", "1e-3", "--bf16"]
        argv += ["--micro-batch-size", str(PAIRS)]
        argv += ["--global-batch-size", str(PAIRS * MICRO_BATCHES)]
        name = f"{family}: host waits of a step's forward and backward passes"
        with record.check(name, ALLOWED, unit="a step") as result:
            found = processes.run(
                "megatron_infifpo.checks.waits:measure",
                {"argv": argv, "cuda": options.cuda},
                folder / "waits",
                seconds=options.seconds / 2,
            )[0]
            assert found["micro_batches"] == (STEPS - 1) * MICRO_BATCHES
            result.value = sum(found["inside"].values()) / (STEPS - 1)
            result.note = _most(found["inside"])
            a_step = sum(found["outside"].values()) / (STEPS - 1)
            outside = a_step, _most(found["outside"])
        if result.value is not None:
            name = f"{family}: host waits of a step beside those"
            record.figure(name, outside[0], "a step", outside[1])


def _most(counts: dict[str, int]) -> str:
    return "; ".join(f"{count} x {line}" for line, count in list(counts.items())[:SHOWN])
