"""The table of a run of checks, and its file."""

import datetime
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_infifpo.gpu_check.records import Check
from megatron_infifpo.gpu_check.runner import Outcome

TITLES = ("check", "error", "limit", "unit", "seconds", "peak MiB", "result")
# Checks that took no time of their own were a by-product of the one above.
LEAST = 0.005


def table(checks: Sequence[Check]) -> str:
    """One line a check, under the names of their groups."""
    lines = [_cells(check) for check in checks]
    widths = [max(len(line[i]) for line in [TITLES, *lines]) for i in range(len(TITLES))]
    shown, group = [_line(TITLES, widths)], ""
    for check, cells in zip(checks, lines, strict=True):
        if check.group != group:
            group = check.group
            shown.append(group)
        shown.append(_line(cells, widths))
    return "\n".join(shown)


def _cells(check: Check) -> tuple[str, ...]:
    limit = "" if check.limit is None else f"{'>=' if check.at_least else ''}{check.limit:.3g}"
    note = f": {check.note}" if check.note and check.status != "passed" else ""
    return (
        f"  {check.name}",
        "" if check.value is None else f"{check.value:.3g}",
        limit,
        check.unit,
        f"{check.seconds:.2f}" if check.seconds >= LEAST else "",
        f"{check.peak_mib:.0f}" if check.peak_mib else "",
        check.status + note,
    )


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, last = cells[0].ljust(widths[0]), cells[-1]
    middle = [cell.rjust(width) for cell, width in zip(cells[1:-1], widths[1:-1], strict=True)]
    return "  ".join([first, *middle, last])


def machine(facts: dict[str, Any]) -> str:
    """Lines on what the checks ran on."""
    lines = []
    for name, value in facts.items():
        if name == "packages":
            value = ", ".join(f"{k} {v}" for k, v in value.items() if v != "not installed")
        elif isinstance(value, list):
            value = ", ".join(f"{value.count(v)} x {v}" for v in dict.fromkeys(value))
        lines.append(f"{name}: {value}")
    return "\n".join(lines)


def summary(outcome: Outcome) -> str:
    """How many checks passed, failed, were skipped, and are figures."""
    counts: dict[str, int] = {}
    for check in outcome.checks:
        counts[check.status] = counts.get(check.status, 0) + 1
    said = ", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing checked"
    return f"{said} in {outcome.whole_seconds:.0f} s"


def write_json(path: Path, outcome: Outcome, command: Sequence[str]) -> None:
    """Write all that was found, for other programs and for those who could not look on."""
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "revision": revision(),
        "exit_code": outcome.exit_code,
        "unusable": outcome.unusable,
        "machine": outcome.facts,
        "whole_seconds": round(outcome.whole_seconds, 1),
        "seconds": {name: round(seconds, 1) for name, seconds in outcome.seconds.items()},
        "checks": [check.as_json() for check in outcome.checks],
        "logs": outcome.logs,
    }
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def revision() -> str | None:
    """Git's name of this source, with a mark if it was changed; None outside of a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
