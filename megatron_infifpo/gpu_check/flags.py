"""Group: flags of Megatron's that work on GPUs only, in real steps beside a run without them.

What concerns the optimizer's state goes on from what it saved, too, beside itself. On a CPU, which
refuses these flags, one run with a flag for any device stands for them.
"""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.engine.environment import installed
from megatron_infifpo.gpu_check.jobs import CALM, TITLES, prepare
from megatron_infifpo.gpu_check.records import Options, Recorder, Result
from megatron_infifpo.gpu_check.training import (
    FP8,
    FP8_CAPABILITY,
    OTHER,
    Run,
    collect,
    difference,
    run_once,
)
from megatron_infifpo.megatron_flags.gpu_runs import FLASH, GPU_RUNS, NCCL, NVML, TE, GpuRun

PLAIN = "bf16"
ON_A_CPU = GpuRun("recomputed parts", ("--recompute-activations",), resumed=True)


def choose(
    options: Options, *, packages: Collection[str], fp8: bool
) -> tuple[list[GpuRun], dict[str, str]]:
    """Return the runs of this machine, and why others are left out.

    Args:
        options: of the group.
        packages: those of the runs' that are installed.
        fp8: the GPU has FP8 products.
    """
    if not options.cuda:
        return [ON_A_CPU], {run.name: "its flags are for GPUs" for run in GPU_RUNS}
    if options.quick:
        return [], {run.name: "left out with --quick" for run in GPU_RUNS}
    chosen, skipped = [], {}
    for run in GPU_RUNS:
        if run.package is not None and run.package not in packages:
            skipped[run.name] = f"{run.package} is not installed"
        elif run.fp8 and not fp8:
            skipped[run.name] = "the GPU has no FP8 products (compute capability below 8.9)"
        else:
            chosen.append(run)
    return chosen, skipped


def check(options: Options, record: Recorder) -> None:
    """Run what this machine can, then what is resumed; compare losses and norms of gradients."""
    packages = {name for name in (TE, NVML, FLASH) if installed(name)}
    fp8 = options.cuda and torch.cuda.get_device_capability() >= FP8_CAPABILITY
    chosen, skipped = choose(options, packages=packages, fp8=fp8)
    for name, reason in skipped.items():
        record.skip(name, reason)
    if not chosen:
        return
    folder = Path(options.folder)
    prepare(folder, "llama", **CALM)
    runs, again = [Run(PLAIN, ("--bf16",))], []
    pairs = [(run.name, PLAIN, FP8 if run.fp8 else OTHER) for run in chosen]
    for run in chosen:
        own = folder / "files" / run.name
        own.mkdir(parents=True)
        (own / "nccl.yaml").write_text(NCCL, encoding="utf-8")
        flags = ("--bf16", *(flag.replace("{folder}", str(own)) for flag in run.flags))
        runs.append(Run(run.name, flags))
        if run.resumed:
            again.append(Run(f"{run.name}: resumed", flags, source=run.name))
            pairs.append((again[-1].name, run.name, OTHER))
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(8 if options.cuda else 2) as pool:
        for wave in (runs, again):
            futures = {
                run.name: pool.submit(run_once, run, folder, options.seconds / 3)
                for run in wave
                if run.source is None or run.source in found
            }
            collect(wave, futures, found, record)
    for name, other, limits in pairs:
        if {name, other} <= found.keys():
            for key, limit in zip(("losses", "norms"), limits, strict=True):
                value = difference(found[name][key], found[other][key])
                record.result(f"{name}, {TITLES[key]}", Result(value, limit), unit="relative")
