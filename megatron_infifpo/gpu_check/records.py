"""What a check found, and the recorder that a group of checks writes it with."""

import contextlib
import dataclasses
import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED, MEASURED = "passed", "failed", "skipped", "measured"
MISSED = "missed"  # a figure that was promised: nothing is wrong, and it is said


@dataclass(frozen=True)
class Options:
    """What a group of checks is told.

    Attributes:
        device: "cuda" or "cpu".
        quick: only what takes little time.
        devices: GPUs, or ranks that a CPU may run.
        shapes: names of models to measure, keys of `shapes.SHAPES`.
        folder: an empty one for what the group writes.
        seconds: until the group is ended.
    """

    device: str
    quick: bool
    devices: int
    shapes: tuple[str, ...]
    folder: str
    seconds: float

    @property
    def cuda(self) -> bool:
        """Whether the group runs on GPUs."""
        return self.device == "cuda"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Options":
        """Read what `dataclasses.asdict` made, by way of JSON."""
        return cls(**{**values, "shapes": tuple(values["shapes"])})


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        group, name: what was checked.
        status: passed; failed; skipped, for the reason in `note`; or measured: a figure without a
            limit; missed: a figure that was promised, and is not reached.
        value: the error or the figure; None where it only had to work.
        limit: the largest value that passes, or the smallest with `at_least`.
        unit: of both.
        seconds: that the check took.
        peak_mib: most memory that the process has held on the GPU meanwhile; of a CPU, ever.
        note: one line.
    """

    group: str
    name: str
    status: str
    value: float | None = None
    limit: float | None = None
    unit: str = ""
    at_least: bool = False
    seconds: float = 0.0
    peak_mib: float = 0.0
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Fields, with None for a number that JSON does not have."""
        fields = dataclasses.asdict(self)
        for name in ("value", "limit"):
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name], fields["note"] = None, f"{name} {fields[name]} {self.note}".strip()
        return fields


@dataclass
class Result:
    """What a check fills in while it runs: see `Check`.

    Without a `peak_mib`, the process's own is taken.
    """

    value: float | None = None
    limit: float | None = None
    note: str = ""
    peak_mib: float | None = None

    def worst(self, value: float, limit: float, note: str) -> None:
        """Take one of several variants, if it is nearer to its limit (or further beyond)."""
        assert limit > 0
        known = self.value is not None and self.limit is not None
        if not known or not value / limit <= self.value / self.limit:  # type: ignore[operator]
            self.value, self.limit, self.note = value, limit, note


class Recorder:
    """Appends checks to a file as they end, so that a crash or a hang hides none of them."""

    def __init__(self, group: str, path: str | Path):
        """Take the group's name and the file, JSON lines."""
        self.group, self.path = group, Path(path)

    @contextlib.contextmanager
    def check(
        self, name: str, limit: float | None = None, *, unit: str = "", at_least: bool = False
    ) -> Iterator[Result]:
        """Run a check: the body sets `value`; an exception fails it, and the others go on."""
        import torch  # the parent of all groups does without

        from megatron_infifpo.bench.jobs import on_gpu, peak_mib

        result = Result(limit=limit)
        if on_gpu():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start, status = time.perf_counter(), None
        try:
            yield result
            if on_gpu():
                torch.cuda.synchronize()  # a kernel that failed says so here
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            print(getattr(error, "log", ""), file=sys.stderr)  # of a process of the check's own
            status, result.note = FAILED, first_line(error)
        seconds = time.perf_counter() - start
        self.add(
            name,
            status or judge(result, at_least),
            value=result.value,
            limit=result.limit,
            unit=unit,
            at_least=at_least,
            seconds=seconds,
            peak_mib=peak_mib() if result.peak_mib is None else result.peak_mib,
            note=result.note,
        )

    def result(
        self,
        name: str,
        result: Result,
        *,
        unit: str = "",
        at_least: bool = False,
        otherwise: str = FAILED,
    ) -> None:
        """Record what another check has found beside its own value; nothing if it failed before."""
        if result.value is None:
            return
        fields = {"value": result.value, "limit": result.limit, "note": result.note}
        status = judge(result, at_least)
        status = otherwise if status == FAILED else status
        self.add(name, status, unit=unit, at_least=at_least, **fields)

    def figure(self, name: str, value: float, unit: str, note: str = "") -> None:
        """Record a number that no limit applies to."""
        self.add(name, MEASURED, value=value, unit=unit, note=note)

    def skip(self, name: str, reason: str) -> None:
        """Record what cannot be checked here, and why."""
        self.add(name, SKIPPED, note=reason)

    def add(self, name: str, status: str, **fields: Any) -> None:
        """Append a check."""
        line = json.dumps(Check(self.group, name, status, **fields).as_json())
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def judge(result: Result, at_least: bool) -> str:
    """Hold a value to its limit; NaN passes none."""
    if result.value is None:
        return PASSED
    if result.limit is None:
        return MEASURED
    good = result.value >= result.limit if at_least else result.value <= result.limit
    return PASSED if good else FAILED


def read_checks(path: str | Path) -> list[Check]:
    """Checks that a group has recorded so far; a line cut short is left out."""
    if not Path(path).exists():
        return []
    found = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(Check(**json.loads(line)))
    return found


def first_line(error: BaseException) -> str:
    """Say in one line what was raised."""
    lines = str(error).strip().splitlines()
    said = lines[0] if lines else ""
    # What a process of a check's own says names its exception already.
    return said if hasattr(error, "log") else f"{type(error).__name__}: {said}".rstrip(": ")
