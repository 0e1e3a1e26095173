"""What the benchmarks in tools/ share: every run is a process of its own, runs alternate."""

import json
import os
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch

from megatron_infifpo import cpu
from megatron_infifpo.cli import UserError


def on_gpu() -> bool:
    """Whether this run computes on a GPU."""
    return torch.cuda.is_available() and not cpu.is_enabled()


def peak_mib() -> float:
    """Peak memory of this process so far: of the GPU where there is one, else resident."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(name: str) -> dict[str, Any]:
    """Run this program again with `--only name`; its last line of output is JSON.

    Raises:
        UserError: it failed.
    """
    command = [sys.executable, *sys.argv, "--only", name]
    environment = dict(os.environ)
    if not on_gpu():  # the CPU stand-ins cannot be compiled, and are loaded late here
        environment["TORCHDYNAMO_DISABLE"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def alternate(names: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run every method in turn, so many times; what each run returned."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(in_a_process(name))
            print(f"{name:<22}{found[name][-1]['seconds']:>9.2f} s", file=sys.stderr)
    return found


def table(found: dict[str, list[dict[str, Any]]], peer: str, columns: dict[str, str]) -> None:
    """Print medians of seconds and memory, ratios to the peer, and other columns as they are.

    Args:
        found: results by method; each has seconds and mib.
        peer: the method that ratios are to.
        columns: title -> key of a result.
    """
    middle = {
        name: {k: statistics.median(run[k] for run in runs) for k in ("seconds", "mib")}
        for name, runs in found.items()
    }
    titles = "".join(f"{title:>14}" for title in columns)
    print(f"{'':<22}{'seconds':>9}{'speed-up':>10}{'MiB':>8}{'ratio':>7}{titles}")
    for name, runs in found.items():
        seconds, mib = middle[name]["seconds"], middle[name]["mib"]
        more = "".join(f"{statistics.median(r[k] for r in runs):>14.4g}" for k in columns.values())
        print(
            f"{name:<22}{seconds:>9.2f}{middle[peer]['seconds'] / seconds:>10.2f}"
            f"{mib:>8.0f}{mib / middle[peer]['mib']:>7.2f}{more}"
        )
