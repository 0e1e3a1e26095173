"""Run groups of checks, each in a process of its own with a time limit, and judge the whole."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.records import FAILED, PASSED, SKIPPED, Check, Options, read_checks

ALL_PASSED, SOME_FAILED, UNUSABLE = 0, 1, 2


@dataclass(frozen=True)
class Group:
    """Checks that share a process.

    Attributes:
        name: of the group.
        target: `module:function`, called with `Options` and `Recorder`.
        seconds: until it is ended.
        alone: it measures, so nothing runs beside it.
    """

    name: str
    target: str
    seconds: float
    alone: bool = False


def _group(name: str, seconds: float, *, alone: bool = False) -> Group:
    return Group(name, f"megatron_infifpo.gpu_check.{name}:check", seconds, alone)


# The first one says whether there is anything to check, and on how many devices.
ENVIRONMENT = _group("environment", 120, alone=True)
GROUPS = (
    _group("attention", 180),
    _group("families", 300),
    _group("training", 400),
    _group("flags", 450),
    _group("waits", 240),
    _group("head", 180, alone=True),
    _group("layouts", 900, alone=True),
    _group("throughput", 600, alone=True),
)
# Groups that run at once: a CPU has few cores, and their processes share a GPU easily.
AT_ONCE = {"cuda": 4, "cpu": 2}


@dataclass
class GroupOutcome:
    """What a group has found.

    Attributes:
        name: of the group.
        checks: as they ended.
        result: what it returned; None if it did not run to its end.
        log: the end of it, if something failed.
        seconds: that it took.
    """

    name: str
    checks: list[Check] = field(default_factory=list)
    result: Any = None
    log: str = ""
    seconds: float = 0.0


@dataclass
class Outcome:
    """What all groups have found.

    Attributes:
        checks: in the order of groups.
        facts: of the machine.
        unusable: why CUDA cannot be used, or None.
        logs: ends of logs, of groups with a failure.
        seconds: of each group.
        whole_seconds: of all of them.
    """

    checks: list[Check] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    unusable: str | None = None
    logs: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    whole_seconds: float = 0.0

    def add(self, found: GroupOutcome) -> None:
        """Take what a group has found."""
        self.checks += found.checks
        self.seconds[found.name] = found.seconds
        if found.log:
            self.logs[found.name] = found.log

    @property
    def exit_code(self) -> int:
        """0: all passed; 1: something failed; 2: CUDA cannot be used."""
        if self.unusable is not None:
            return UNUSABLE
        failed = any(check.status == FAILED for check in self.checks)
        return SOME_FAILED if failed or not self.checks else ALL_PASSED


def call(argument: list) -> Any:
    """Run one group in this process: `[group name, target, options, file of checks]`."""
    import importlib

    from megatron_infifpo.gpu_check.records import Recorder

    name, target, options, path = argument
    module, function = target.split(":")
    check = getattr(importlib.import_module(module), function)
    return check(Options.from_json(options), Recorder(name, path))


def run_groups(
    groups: Sequence[Group],
    options: Options,
    *,
    first: Group | None = ENVIRONMENT,
    seconds: float | None = None,
) -> Outcome:
    """Run groups, those that do not measure beside each other; a line on stderr says how each went.

    Args:
        groups: to run.
        options: of all; each gets a folder of its own in theirs.
        first: a group that returns `unusable`, `devices` and `facts`; None runs none.
        seconds: limit for every group, in place of its own.
    """
    outcome, start = Outcome(), time.monotonic()
    progress = Progress(len(groups) + (first is not None))
    if first is not None:
        found = run_group(first, options, seconds)
        outcome.add(found)
        progress.show(found)
        if found.result is None:
            why = found.checks[-1].note
            outcome.unusable = f"this machine's environment could not be checked: {why}"
        else:
            outcome.unusable, outcome.facts = found.result["unusable"], found.result["facts"]
            options = dataclasses.replace(options, devices=found.result["devices"])
    if outcome.unusable is None:
        together = [group for group in groups if not group.alone]
        results: dict[str, GroupOutcome] = {}
        with ThreadPoolExecutor(AT_ONCE[options.device]) as pool:
            futures = [pool.submit(run_group, group, options, seconds) for group in together]
            for future in as_completed(futures):
                progress.show(future.result())
                results[future.result().name] = future.result()
        for group in groups:
            if group.alone:
                results[group.name] = run_group(group, options, seconds)
                progress.show(results[group.name])
        for group in groups:
            outcome.add(results[group.name])
    outcome.whole_seconds = time.monotonic() - start
    return outcome


class Progress:
    """Lines on stderr, one a group that has ended."""

    def __init__(self, groups: int):
        """Take how many there are."""
        self.groups, self.ended = groups, 0

    def show(self, found: "GroupOutcome") -> None:
        """Say how a group went."""
        self.ended += 1
        counts = {s: sum(c.status == s for c in found.checks) for s in (PASSED, FAILED, SKIPPED)}
        said = ", ".join(f"{count} {status}" for status, count in counts.items())
        place = f"[{self.ended}/{self.groups}]"
        print(f"{place} {found.name}: {said} ({found.seconds:.0f} s)", file=sys.stderr, flush=True)


def run_group(group: Group, options: Options, seconds: float | None = None) -> GroupOutcome:
    """Run one group in a process; whatever happens to it becomes a check."""
    folder = Path(options.folder) / group.name
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    limit = seconds or group.seconds
    own = dataclasses.replace(options, folder=str(scratch), seconds=limit)
    path, start, found = folder / "checks.jsonl", time.monotonic(), GroupOutcome(group.name)
    argument = [group.name, group.target, dataclasses.asdict(own), str(path)]
    try:
        found.result = processes.run(
            "megatron_infifpo.gpu_check.runner:call",
            argument,
            folder,
            seconds=limit,
            environment=environment(options.device),
            own_session=True,
        )[0]
    except processes.ProcessFailure as error:
        failed = Check(group.name, "runs to its end", FAILED, note=str(error))
        found.checks.append(failed)
        found.log = error.log
    found.checks = read_checks(path) + found.checks
    if not found.log and any(check.status == FAILED for check in found.checks):
        found.log = processes.read_tail(folder / "rank0.log")
    found.seconds = time.monotonic() - start
    return found


def environment(device: str) -> dict[str, str]:
    """Variables of the processes: no GPU where the CPU is asked for, and no network."""
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return variables
