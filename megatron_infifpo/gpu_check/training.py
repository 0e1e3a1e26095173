"""Group 5: real steps through Megatron's loop: saved, resumed, moved between kinds of layers, FP8.

The runs are independent processes: those of a wave share the device.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.bench.jobs import training_flags
from megatron_infifpo.engine.environment import installed
from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.jobs import CALM, SMALL, TITLES, prepare, train
from megatron_infifpo.gpu_check.records import Options, Recorder, Result

STEPS, SAVED = 4, 2
LOCAL = ("--transformer-impl", "local")
# Without it optimizer state is saved as the ranks and layers have it, and does not move.
MOVES = "--dist-ckpt-optim-fully-reshardable"
# Relative differences of losses, and of gradients' norms: after a resume, where a GPU adds in any
# order; on other layers or in bfloat16, which differs from float32 by 3e-4 and 3e-3 on a CPU; FP8.
EXACT, RESUMED, OTHER, FP8 = (0.0, 0.0), (1e-4, 1e-3), (5e-3, 0.03), (0.03, 0.15)
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: of it.
        flags: beside what all runs have.
        hide: as if Transformer Engine and Apex were not installed.
        source: the run whose checkpoint of step `SAVED` it starts from.
    """

    name: str
    flags: tuple[str, ...]
    hide: bool = False
    source: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two runs that must agree in the last steps, which both have; limits of losses and norms."""

    title: str
    run: str
    other: str
    limits: tuple[float, float]


@dataclass
class Plan:
    """Runs, in waves, and what is compared.

    Attributes:
        waves: the second ones start from checkpoints of the first.
        comparisons: of losses and norms.
        skipped: title -> reason.
    """

    waves: tuple[list[Run], list[Run]] = field(default_factory=lambda: ([], []))
    comparisons: list[Comparison] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def make_plan(*, te: bool, fp8: bool, exact: bool) -> Plan:
    """Choose runs.

    Args:
        te: Transformer Engine is there.
        fp8: the GPU has FP8 products.
        exact: the device adds in one order, so that a resumed run is the same to the bit.
    """
    plan = Plan()
    first, second = plan.waves
    first += [
        Run("fp32", LOCAL, hide=True),
        Run("bf16", (*LOCAL, "--bf16"), hide=True),
    ]
    second.append(Run("fp32-resumed", LOCAL, hide=True, source="fp32"))
    resumed = EXACT if exact else RESUMED
    plan.comparisons += [
        Comparison("PyTorch's Adam, fp32: resumed", "fp32-resumed", "fp32", resumed),
        Comparison("PyTorch's Adam, bf16 beside fp32", "bf16", "fp32", OTHER),
    ]
    if not te:
        reason = "Transformer Engine is not installed, or there is no GPU"
        plan.skipped = dict.fromkeys(
            ("FusedAdam", "local layers -> te", "te -> local layers", "adapters", "FP8"), reason
        )
        return plan
    te_flags, local_flags = ("--bf16", MOVES), (*LOCAL, "--bf16", MOVES)
    adapters = ("--lora-rank", "8")
    first += [Run("te", te_flags), Run("fused", local_flags)]
    first += [Run("te-lora", (*te_flags, *adapters)), Run("lora", (*local_flags, *adapters))]
    second += [
        Run("te-resumed", te_flags, source="te"),
        Run("local-to-te", te_flags, source="fused"),
        Run("te-to-local", local_flags, source="te"),
        Run("lora-resumed", (*te_flags, *adapters), source="te-lora"),
    ]
    plan.comparisons += [
        Comparison("FusedAdam, te: resumed", "te-resumed", "te", OTHER),
        Comparison("FusedAdam, te beside local layers", "te", "fused", OTHER),
        Comparison("FusedAdam beside PyTorch's Adam", "fused", "bf16", OTHER),
        Comparison("local layers -> te", "local-to-te", "te", OTHER),
        Comparison("te -> local layers", "te-to-local", "fused", OTHER),
        Comparison("adapters, te beside local layers", "te-lora", "lora", OTHER),
        Comparison("adapters, te: resumed", "lora-resumed", "te-lora", OTHER),
    ]
    if fp8:
        first.append(Run("fp8", ("--bf16", "--fp8-format", "hybrid")))
        plan.comparisons.append(Comparison("FP8 beside bf16", "fp8", "te", FP8))
    else:
        plan.skipped["FP8"] = "the GPU has no FP8 products (compute capability below 8.9)"
    return plan


def check(options: Options, record: Recorder) -> None:
    """Run the plan of this machine."""
    te = options.cuda and installed("transformer_engine")
    fp8 = options.cuda and torch.cuda.get_device_capability() >= FP8_CAPABILITY
    plan = make_plan(te=te, fp8=fp8, exact=not options.cuda)
    for title, reason in plan.skipped.items():
        record.skip(title, reason)
    folder = Path(options.folder)
    prepare(folder, "llama", **CALM)
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(4 if options.cuda else 2) as pool:
        for wave in plan.waves:
            futures = {
                run.name: pool.submit(run_once, run, folder, options.seconds / 3)
                for run in wave
                if run.source is None or run.source in found
            }
            collect(wave, futures, found, record)
    for comparison in plan.comparisons:
        if comparison.run in found and comparison.other in found:
            for key, limit in zip(("losses", "norms"), comparison.limits, strict=True):
                value = difference(found[comparison.run][key], found[comparison.other][key])
                title = f"{comparison.title}, {TITLES[key]}"
                record.result(title, Result(value, limit), unit="relative")


def collect(
    wave: Sequence[Run],
    futures: Mapping[str, Future[dict[str, Any]]],
    found: dict[str, dict[str, Any]],
    record: Recorder,
) -> None:
    """Wait for the runs of a wave; each is a check: losses are finite."""
    for run in wave:
        if run.name not in futures:
            record.skip(f"run {run.name}", f"the run {run.source} failed")
            continue
        with record.check(f"run {run.name}") as result:
            got = futures[run.name].result()
            bad = [x for x in got["losses"] + got["norms"] if not math.isfinite(x)]
            assert not bad, f"losses {got['losses']}, norms of gradients {got['norms']}"
            steps = STEPS - (SAVED if run.source else 0)
            assert len(got["losses"]) == steps, f"{len(got['losses'])} steps, expected {steps}"
            result.peak_mib = got["peak_mib"]
            found[run.name] = got


def run_once(run: Run, folder: Path, seconds: float) -> dict[str, Any]:
    """Train in a process of its own, from the pivot or from another run's checkpoint."""
    save = folder / run.name
    if run.source is not None:
        shutil.copytree(folder / run.source, save)
        (save / "latest_checkpointed_iteration.txt").write_text(str(SAVED), encoding="utf-8")
    argv = [*training_flags(folder, STEPS), *SMALL, *run.flags, "--lr", "1e-3"]
    argv += ["--micro-batch-size", "2", "--global-batch-size", "8"]
    argv += ["--save", str(save), "--save-interval", str(SAVED)]
    target = f"{train.__module__}:{train.__name__}"
    argument = {"argv": argv, "hide": run.hide}
    found: dict[str, Any] = processes.run(
        target, argument, folder / "logs" / run.name, seconds=seconds
    )[0]
    return found


def difference(found: Sequence[float], other: Sequence[float]) -> float:
    """Largest relative difference in the last steps, which both runs have."""
    count = min(len(found), len(other))
    pairs = zip(found[-count:], other[-count:], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)
