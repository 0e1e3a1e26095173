"""How a run stands, by what its stages have left."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_infifpo.run.board import DONE, FAILED, RUNNING, WAITING, left, table
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.schema import Run
from megatron_infifpo.run.slurm import JOB, state
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.run.stamps import LOG, Known, know, progress
from megatron_infifpo.training.lock import held


def status(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Lines of a table of all stages, and what must be made again."""
    names = Names(Path(run.output))
    known = know(stages, names)
    rows, notes = [], list[str]()
    for name, each in known.items():
        said, share, seconds = _stands(names, name, each)
        rows.append((name, said, share, seconds))
        if why := each.other:
            notes.append(f"{name} was made of something else: {why}")
    return [*table(rows), *notes]


def _stands(names: Names, name: str, known: Known) -> tuple[str, float | None, float | None]:
    """State of a stage, how much of it is done, and seconds: that it took, or takes yet."""
    if known.done:
        return DONE, None, known.stamp["seconds"]
    folder = names.stage(name)
    if held(folder):
        share = progress(folder / LOG)
        return RUNNING, share, left(share, time.time() - known.stamp.get("begun", time.time()))
    path = folder / JOB
    if path.exists() and (job := state(str(json.loads(path.read_text())["job"]))):
        return job.lower(), None, None
    return (FAILED if known.stamp else WAITING), progress(folder / LOG), None
