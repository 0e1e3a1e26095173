"""Results of runs, by what they are of: results.jsonl, a line a run."""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.files import iter_raw
from megatron_infifpo.study.asked import SETTINGS
from megatron_infifpo.study.statistics import Pair

FINAL = "final"
NOT_NUMBERS = ("condition", "method", "settings", "role", "variant", "set", "seed")


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        condition: what data it had.
        method: how it was trained.
        settings: "matched" or "tuned"; None where there is nothing to tune: it counts for both.
        role: "final", or what it was for.
        variant: its settings, as JSON.
        pair: its set and seed: runs that share them in a condition share data, start, references.
        numbers: all that was measured, by path: accuracy, why/auc. Infinite ones are left out.
            accuracy_formed is the accuracy of those answers that are one of the two.
    """

    condition: str
    method: str
    settings: str | None
    role: str
    variant: str
    pair: Pair
    numbers: dict[str, float]


class Outcomes:
    """Rows of all runs, in one order whatever the file's."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Take them in order."""
        self.rows = sorted(
            rows,
            key=lambda r: (r.role, r.condition, r.method, r.settings or "", r.variant, r.pair),
        )
        self.final = [row for row in self.rows if row.role == FINAL]
        self._runs: dict[tuple[bool, str, str], list[Row]] = {}
        for row in self.rows:
            key = (row.role == FINAL, row.condition, row.method)
            self._runs.setdefault(key, []).append(row)

    def runs(self, condition: str, method: str, settings: str) -> list[Row]:
        """Final runs of a method in a condition; without settings of their own, of any."""
        found = self._runs.get((True, condition, method), [])
        own = [row for row in found if row.settings == settings]
        return own or [row for row in found if row.settings is None]

    def pilots(self, condition: str, method: str) -> dict[str, list[Row]]:
        """Runs on seeds that are not reported, by variant."""
        found: dict[str, list[Row]] = {}
        for row in self._runs.get((False, condition, method), []):
            found.setdefault(row.variant, []).append(row)
        return found

    def values(self, condition: str, method: str, settings: str, outcome: str) -> dict[Pair, float]:
        """A number of final runs by (set, seed), of those that have it."""
        return numbers(self.runs(condition, method, settings), outcome)

    def conditions(self) -> set[str]:
        """Conditions that have a run."""
        return {row.condition for row in self.rows}

    def methods(self, condition: str) -> set[str]:
        """Methods with final runs in a condition."""
        return {row.method for row in self.final if row.condition == condition}

    def settings(self, condition: str) -> list[str]:
        """Which of "matched" and "tuned" any method of a condition has final runs of."""
        found = {row.settings for row in self.final if row.condition == condition}
        return [each for each in SETTINGS if each in found]

    def paths(self, condition: str, prefix: str) -> list[str]:
        """Paths of numbers below a prefix that a final run of the condition has, by name."""
        return sorted(
            {
                path
                for row in self.final
                if row.condition == condition
                for path in row.numbers
                if path.startswith(prefix)
            }
        )


def numbers(rows: Iterable[Row], outcome: str) -> dict[Pair, float]:
    """A number of rows by (set, seed), of those that have it."""
    return {row.pair: row.numbers[outcome] for row in rows if outcome in row.numbers}


def read_outcomes(path: Path) -> Outcomes:
    """Read results.jsonl, packed or not.

    Raises:
        UserError: there is no such file; a line is no result, or is of the same run as another.
    """
    rows: list[Row] = []
    seen: dict[tuple[object, ...], str] = {}
    for raw in iter_raw(path, wanted="results of the study"):
        if raw.error is not None or not isinstance(raw.value, dict):
            problem = raw.error or "not a JSON object"
            raise UserError(f"{raw.where}: {problem}, expected the result of a run")
        row = _row(raw.value, raw.where)
        variant = row.variant if row.role != FINAL else ""
        key = (row.role, row.condition, row.method, row.settings, row.pair, variant)
        if key in seen:
            raise UserError(
                f"{raw.where}: {row.method} in {row.condition}, set {row.pair[0]}, seed "
                f"{row.pair[1]} is there already, in {seen[key]}; expected one result of a run"
            )
        seen[key] = raw.where
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no results, expected a line for each run")
    return Outcomes(rows)


def _row(value: dict[str, Any], where: str) -> Row:
    """Check a line and make a row of it."""
    for name, kind, what in (
        ("condition", str, "a text"),
        ("method", str, "a text"),
        ("set", int, "a whole number"),
        ("seed", int, "a whole number"),
    ):
        if not isinstance(value.get(name), kind) or isinstance(value[name], bool):
            raise UserError(f"{where}: {name} is {value.get(name)!r}, expected {what}")
    found = dict(_numbers({k: v for k, v in value.items() if k not in NOT_NUMBERS}, ""))
    if found.get("neither", 1.0) < 1:
        found["accuracy_formed"] = found["accuracy"] / (1 - found["neither"])
    return Row(
        value["condition"],
        value["method"],
        value.get("settings"),
        str(value.get("role", FINAL)),
        json.dumps(value.get("variant"), sort_keys=True),
        (value["set"], value["seed"]),
        found,
    )


def _numbers(value: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield all finite numbers of nested dictionaries with their paths."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _numbers(each, f"{path}/{name}" if path else str(name))
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        yield path, float(value)
