"""The page about rounds, from the line that each has left in rounds.jsonl."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.report import plots
from megatron_infifpo.report.collect import Curve
from megatron_infifpo.report.html import Page
from megatron_infifpo.storage.manifests import check_fields

_SCHEMA: dict[str, Any] = dict.fromkeys(("round", "prompts", "responses", "records", "cut"), int)
_SCHEMA |= {"reward": (int, float, type(None)), "seconds": dict, "training": {"first": dict}}
_LARGEST = 1e30  # NaN is not below it, either
_AGAIN = "infifpo rounds writes it again"
METRICS = {"loss": "loss", "spread": "residual/std", "KL": "kl/initial", "tokens": "length"}
"""Columns of the table: what they are called, and which metric of a round's first step they are."""


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Return what came of each round: its counts, and `metrics`, those of its first step.

    Raises:
        UserError: the file is broken.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is broken JSON ({error}): {_AGAIN}") from None
        check_fields(row, _SCHEMA, where)
        seconds, metrics = row["seconds"], row["training"]["first"]
        counts = {name: row[name] for name, kind in _SCHEMA.items() if kind is int}
        there = {n: v for n, v in {"reward": row["reward"], **seconds}.items() if v is not None}
        for name, value in {**counts, **metrics, **there}.items():
            if not isinstance(value, int | float) or not abs(value) < _LARGEST:
                raise UserError(f"{where}: {name} is {value!s:.40}, expected a number: {_AGAIN}")
        spent = sum(time for time in seconds.values() if time is not None)
        found.append(counts | {"reward": row["reward"], "seconds": spent, "metrics": metrics})
    if not found:
        raise UserError(f"{path} is empty: no round is done yet")
    return found


def rounds_page(folder: Path, rows: list[dict[str, Any]]) -> Page:
    """Show rounds in a table, and what changed from one to the next."""
    page = Page(f"Rounds in {folder}")
    used = {name: tag for name, tag in METRICS.items() if any(tag in r["metrics"] for r in rows)}
    page.heading(
        "Rounds",
        "Reward: the mean over all responses of a round's policy. Loss, spread of the residuals, "
        "KL and tokens of a response: at the first step, where the policy has sampled what it is "
        "trained on, so that KL estimates its distance from the given pivot.",
    )
    heads = ["round", "prompts", "records", "cut", "reward", *used, "seconds"]
    page.table([heads, *(_cells(row, used) for row in rows)])

    def over(tag: str) -> dict[str, Curve]:
        return _curve(tag, rows, [row["metrics"].get(tag) for row in rows])

    kl = sorted({tag for row in rows for tag in row["metrics"] if tag.startswith("kl/")})
    panels = [
        ("reward", _curve("reward", rows, [row["reward"] for row in rows])),
        ("spread of the residuals", over("residual/std")),
        ("kl", {tag.removeprefix("kl/"): curve for tag in kl for curve in over(tag).values()}),
        ("tokens of a response", over("length")),
    ]
    page.figure(plots.curves([p for p in panels if p[1]], "round"), "what changed over rounds")
    return page


def _cells(row: dict[str, Any], used: dict[str, str]) -> list[object]:
    numbers = [row["reward"], *(row["metrics"].get(tag) for tag in used.values())]
    shown = ["-" if number is None else float(number) for number in numbers]
    cut = f"{row['cut'] / max(row['responses'], 1):.1%}"
    return [row["round"], row["prompts"], row["records"], cut, *shown, f"{row['seconds']:.0f}"]


def _curve(name: str, rows: list[dict[str, Any]], values: list[float | None]) -> dict[str, Curve]:
    """A curve over the rounds that have a value; nothing where none has."""
    known = [(row["round"], v) for row, v in zip(rows, values, strict=True) if v is not None]
    if not known:
        return {}
    steps, found = (np.array(column) for column in zip(*known, strict=True))
    return {name: (steps, found, np.zeros(len(steps)))}
