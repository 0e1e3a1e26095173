"""What came of each round: rounds.jsonl, a line a round, and a table of it."""

import json
import logging
import math
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.lists import CUT
from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.rounds.stages import RoundFolder
from megatron_infifpo.storage.aside import write_text

Row = dict[str, Any]


def record_round(job: RoundsJob, here: RoundFolder, seconds: dict[str, float | None]) -> Row:
    """Write what came of a round, when all of its stages are done; return it.

    Args:
        job: the rounds.
        here: the round.
        seconds: of each stage; None where nobody knows.
    """
    row: Row = {"round": here.number, **sampled(job, here)}
    row |= {"records": lines(here.records), "seconds": seconds}
    row["training"] = trained(job, here)
    write_text(here.row, json.dumps(row, indent=1) + "\n")
    write_rows(job)
    return row


def write_rows(job: RoundsJob) -> None:
    """Write rounds.jsonl of the rounds that are done."""
    write_text(job.output / "rounds.jsonl", "".join(json.dumps(r) + "\n" for r in rows(job)))


def rows(job: RoundsJob) -> list[Row]:
    """The rounds that are done."""
    paths = (RoundFolder(job, number).row for number in range(job.rounds))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]


def sampled(job: RoundsJob, here: RoundFolder) -> Row:
    """Return counts of prompts and responses, and the mean reward of all that were judged.

    What is equal is judged once, and counts as often as it was sampled.
    """
    from megatron_infifpo.responses.judging import read_cache
    from megatron_infifpo.responses.labels import read_responses

    prompts, responses, cut = 0, 0, 0
    with here.responses.open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            prompts, responses = prompts + 1, responses + len(line["responses"])
            cut += line["finish_reasons"].count(CUT)
    found = []
    if job.judged:
        entries = read_cache(Path(f"{here.records}.scores"))
        keep_cut = job.lists or "--keep-cut" in job.words("label")
        judged = read_responses([here.responses], keep_cut=keep_cut, skipped=[])
        for name, own in judged.items():
            entry = entries.get(name, {})
            if entry.get("responses") == [answer.text for answer in own.answers]:
                found += [entry["scores"][sample.place] for sample in own.samples]
    # A judge may have given none, or a text: such a prompt has no record, either.
    found = [score for score in found if isinstance(score, int | float) and math.isfinite(score)]
    reward = sum(found) / len(found) if found else None
    return {"prompts": prompts, "responses": responses, "cut": cut, "reward": reward}


def trained(job: RoundsJob, here: RoundFolder) -> dict[str, dict[str, float]]:
    """Return the metrics of training: at the round's first step, and the means over its steps.

    At the first step responses are the policy's own, so that `kl/initial` estimates the KL there.
    """
    from megatron_infifpo.report.collect import read_curves

    logging.getLogger("tensorboard").setLevel(logging.WARNING)
    start = here.number * job.steps if job.carried else 0
    found: dict[str, dict[str, float]] = {"first": {}, "mean": {}}
    try:
        curves = read_curves(here.checkpoint / "tensorboard")
    except UserError:  # the user's --tensorboard-dir is another one
        return found
    for name, (steps, values, _) in curves.items():
        inside = values[(steps > start) & (steps <= start + job.steps)]
        if len(inside) and math.isfinite(inside.sum()):
            found["first"][name] = float(inside[0])
            found["mean"][name] = float(inside.mean())
    return found


def lines(path: Path) -> int:
    """Lines of a file."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def table(rows: list[Row]) -> str:
    """Return a table of rounds, with the columns that one of them has."""
    from megatron_infifpo.report.rounds import METRICS

    metrics = {
        name: tag
        for name, tag in METRICS.items()
        if any(tag in r["training"]["first"] for r in rows)
    }
    stages = list(dict.fromkeys(stage for row in rows for stage in row["seconds"]))
    heads = ["round", "prompts", "records", "cut", "reward", *metrics]
    heads += [f"{stage} s" for stage in stages]
    cells = [heads]
    for row in rows:
        share = row["cut"] / max(row["responses"], 1)
        numbers = [row["reward"], *(row["training"]["first"].get(tag) for tag in metrics.values())]
        times = [row["seconds"].get(stage) for stage in stages]
        cells.append(
            [str(row["round"]), str(row["prompts"]), str(row["records"]), f"{share:.0%}"]
            + ["-" if number is None else f"{number:.4g}" for number in numbers]
            + ["-" if time is None else f"{time:.0f}" for time in times]
        )
    widths = [max(map(len, column)) + 2 for column in zip(*cells, strict=True)]
    return "\n".join(
        "".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in cells
    )
