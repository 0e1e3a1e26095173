"""Group 7: where the host waits for the GPU in a training step.

A GPU says so itself (`torch.cuda.set_sync_debug_mode`). On a CPU, where nothing waits, what would
is counted: see `host_waits`.
"""

import collections
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench.jobs import recorded_training, training_flags
from megatron_infifpo.families import OWN_LAYERS, TINY
from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.host_waits import counting
from megatron_infifpo.gpu_check.jobs import SMALL, prepare
from megatron_infifpo.gpu_check.records import Options, Recorder

# Experts wait in every layer: Megatron asks the GPU how many tokens each of them gets.
FAMILIES = ("llama", *(name for name in OWN_LAYERS if "num_local_experts" not in TINY[name]))
STEPS, MICRO_BATCHES, PAIRS = 3, 4, 2
# A step: one look for log-probs that are not finite. On a CPU what is then done with what came back
# to the host counts as well.
ALLOWED = {"cuda": 1.0, "cpu": 3.0}
SHOWN = 3


class Waits:
    """Host waits by place, `inside` of a micro-batch's forward and backward pass and `outside`."""

    def __init__(self, cuda: bool):
        """Take whether a GPU is asked."""
        self.cuda = cuda
        self.inside: collections.Counter[str] = collections.Counter()
        self.everywhere: collections.Counter[str] = collections.Counter()
        self.micro_batches = 0
        self.counts = False
        self.depth = 0

    @property
    def outside(self) -> collections.Counter[str]:
        """Waits of a step that are not inside of a micro-batch."""
        return self.everywhere - self.inside

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Count what happens within."""
        self.counts = True
        try:
            with self._warnings() if self.cuda else counting(self.everywhere):
                yield
        finally:
            self.counts = False

    @contextlib.contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Mark what is part of a forward or backward pass."""
        on_cpu = self.counts and not self.cuda
        self.depth += 1
        try:
            with counting(self.inside) if on_cpu else contextlib.nullcontext():
                yield
        finally:
            self.depth -= 1

    @contextlib.contextmanager
    def _warnings(self) -> Iterator[None]:
        """Count what the GPU's driver of PyTorch warns of."""

        def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
            if "synchronizing CUDA operation" not in str(message):
                return
            place = f"{'/'.join(Path(filename).parts[-3:])}:{lineno}"
            for counts in (self.everywhere, self.inside)[: 1 + bool(self.depth)]:
                counts[place] += 1

        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")


def measure(argument: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and count waits after the first step.

    Args:
        argument: argv, flags of training; cuda, whether a GPU is asked.

    Returns:
        micro_batches of the counted steps; inside and outside, counts by place.
    """
    import megatron_infifpo.training.run  # noqa: F401  (readies Megatron for the CPU)
    import megatron.core.pipeline_parallel.schedules as schedules  # isort: skip
    import megatron.training.training as loop  # isort: skip

    waits, steps = Waits(argument["cuda"]), [0]
    forward, backward, train_step = schedules.forward_step, schedules.backward_step, loop.train_step

    def counted_forward(*args: Any, **kwargs: Any) -> Any:
        waits.micro_batches += waits.counts
        with waits.micro_batch():
            return forward(*args, **kwargs)

    def counted_backward(*args: Any, **kwargs: Any) -> Any:
        with waits.micro_batch():
            return backward(*args, **kwargs)

    def counted_step(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        with waits.step() if steps[0] > 1 else contextlib.nullcontext():
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
        with record.check(name, ALLOWED[options.device], unit="a step") as result:
            found = processes.run(
                "megatron_infifpo.gpu_check.waits:measure",
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
    return "; ".join(f"{count} x {place}" for place, count in list(counts.items())[:SHOWN])
