"""Run rounds: one stage after the other, each in a process of its own; what is done is skipped.

What a stage makes has its name once it is whole, so it is done when that is there. A stamp, written
before the stage starts, says which run of the stage before it was made from: what was made from
another one is refused, never mixed.
"""

import json
import os
import shlex
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.job import PROGRAM, Job, split_words
from megatron_infifpo.recipes.processes import Start, begun, stoppable
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.responses.prompts import Prompt, read_prompts
from megatron_infifpo.rounds.clean import remove_old
from megatron_infifpo.rounds.ends import check_end
from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.rounds.prompts import plan_round, pool_sha256, write_prompts
from megatron_infifpo.rounds.settings import claim
from megatron_infifpo.rounds.stages import (
    RoundFolder,
    Stage,
    import_pivot,
    sources_yaml,
    stages_of,
)
from megatron_infifpo.rounds.table import record_round, rows, table, write_rows
from megatron_infifpo.storage.aside import make_folder, write_text
from megatron_infifpo.training.lock import RunLock

Stamp = dict[str, Any]
"""What a stage is known by (id), the id of the one before it (after), and once it is done seconds,
None where nobody saw its end."""
STAMPS, LOGS = "stages", "logs"


def run_rounds(
    job: RoundsJob, start: Start | None = None, environment: Mapping[str, str] = os.environ
) -> None:
    """Run all rounds that are not done, up to the one that the job ends after; say where it is.

    Args:
        job: the rounds.
        start: runs a command; None: in a process of its own.
        environment: of such processes.

    Raises:
        UserError: settings that are not those of the folder's rounds, or a stage that a person must
            mend: it ended with 2, or its output is of another round.
        StageError: a stage that ended otherwise; the same command goes on with it.
        StoppedError: so it does; a signal has stopped it.
    """
    pool = read_pool(job)
    make_folder(job.output)
    lock = RunLock(job.output, "--output")
    lock.take()
    claim(job, pool_sha256(pool))
    idle = all_done(job)
    with stoppable(environment) as run:
        before = run_stage(job, job.output, import_pivot(job), "", start or run)["id"]
        for number in range(last_round(job) + 1):
            here = RoundFolder(job, number)
            if not here.row.exists():
                run_round(job, here, pool, before, start or run)
            before = finished(here, before)
            remove_old(job, number)
    done = rows(job)
    write_rows(job)  # it may be gone, or its last line
    if idle:
        print(f"nothing left to do\n{table(done)}")
    print(f"the policy is in {RoundFolder(job, done[-1]['round']).hf}", flush=True)


def all_done(job: RoundsJob) -> bool:
    """Whether every round is done, up to the one that the job ends after."""
    return all(RoundFolder(job, number).row.exists() for number in range(last_round(job) + 1))


def run_round(
    job: RoundsJob, here: RoundFolder, pool: Sequence[Prompt], before: str, start: Start
) -> None:
    """Run the stages of one round, and write its row of the table; errors as `run_rounds`."""
    make_folder(here.logprobs)
    if not here.prompts.exists():
        write_prompts(here.prompts, prompts_of(job, pool, here.number))
    if job.kind.reads_logprobs:
        write_text(here.sources, sources_yaml(job, here))
    seconds: dict[str, float | None] = {}
    for stage in stages_of(job, here.number):
        stamp = run_stage(job, here.path, stage, before, start)
        before, seconds[stage.name] = stamp["id"], stamp["seconds"]
    record_round(job, here, seconds)
    print(table(rows(job)), flush=True)


def run_stage(job: RoundsJob, folder: Path, stage: Stage, before: str, start: Start) -> Stamp:
    """Run a stage unless it is done.

    Args:
        job: the rounds.
        folder: of the round.
        stage: of it.
        before: what the stage before it is known by.
        start: runs a command.

    Returns:
        The stamp of this stage.

    Raises:
        UserError, StageError: as `run_rounds`.
    """
    path, log = folder / STAMPS / f"{stage.name}.json", folder / LOGS / f"{stage.name}.log"
    stamp = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ours = stamp.get("after") == before and stamp != {}
    if stage.done and not ours:
        raise UserError(
            f"{folder}, {stage.name}: {stage.made} is there, but of another run of the stages "
            f"before it. To do this again, delete {folder} and the rounds after it"
            + (", and put back an older copy of the run's checkpoint" if job.carried else "")
        )
    if not stage.done:
        if not ours or "seconds" in stamp:
            stamp = {"id": uuid.uuid4().hex, "after": before}
        make_folder(path.parent)
        make_folder(log.parent)
        write_text(path, json.dumps(stamp))
        print(f"{folder.name}: {stage.name} ...", end="", flush=True)
        started = time.monotonic()
        words = command(job, stage.job)
        code = start(words, log)
        stamp["seconds"] = round(time.monotonic() - started, 1)
        check_end(folder, stage, code, log, begun(words))
        print(f" {stamp['seconds']:.0f} s", flush=True)
    # Where its end was not seen, this program ended before it could say so.
    write_text(path, json.dumps(stamp := {"seconds": None} | stamp))
    return stamp


def command(job: RoundsJob, stage: Job) -> list[str]:
    """Words that start a stage."""
    name, text = ("launcher", job.launcher) if stage.every_rank else ("python", job.python)
    text = text or job.python or sys.executable
    return [*split_words(text, f"--{name}"), "-m", PROGRAM, *stage.arguments]


def dry_run(job: RoundsJob) -> None:
    """Print the command lines of all rounds, as a shell takes them."""
    read_pool(job)
    print("# once")
    stages = [import_pivot(job)]
    for number in range(last_round(job) + 1):
        for stage in stages:
            print(shown(job, stage.job))
        stages = stages_of(job, number)
        print(f"# round {number}")
    for stage in stages:
        print(shown(job, stage.job))


def shown(job: RoundsJob, stage: Job) -> str:
    """A stage's command as a person would type it."""
    launched = (stage.every_rank and job.launcher) or job.python
    return shlex.join(command(job, stage)) if launched else str(stage)


def read_pool(job: RoundsJob) -> list[Prompt]:
    """Read the prompts of all rounds, and say what of them was left out.

    Raises:
        UserError: a bad one, fewer than a round takes, or none of a source's domain.
    """
    report = ReadReport()
    pool = read_prompts(job.prompts, on_bad=job.on_bad_record, report=report)
    report.show()
    if len(pool) < job.round_prompts:
        raise UserError(
            f"--round-prompts is {job.round_prompts}, but {' '.join(job.prompts)} has {len(pool)}"
        )
    domains = {prompt.domain for prompt in pool}
    for source in job.source_list:
        if unknown := sorted(set(source.domains or ()) - domains):
            raise UserError(
                f"{job.sources}: source {source.name!r} names the domain {unknown[0]!r}, expected "
                f"some of the prompts': {', '.join(sorted(domains))}"
            )
    return pool


def prompts_of(job: RoundsJob, pool: Sequence[Prompt], number: int) -> list[Prompt]:
    """Return a round's prompts."""
    chosen = plan_round(len(pool), job.round_prompts, seed=job.seed, number=number)
    return [pool[i] for i in chosen.tolist()]


def last_round(job: RoundsJob) -> int:
    """The round that this job ends after."""
    return job.rounds - 1 if job.until is None else job.until


def finished(here: RoundFolder, before: str) -> str:
    """What the last stage of a round that is done is known by.

    Args:
        here: the round.
        before: what the stage before its first one is known by.

    Raises:
        UserError: its stamps are not there, or say that it came from something else.
    """
    stamps = []
    for name in ("sample", "export"):
        path = here.path / STAMPS / f"{name}.json"
        if not path.exists():
            raise UserError(f"{path} is missing, although {here.row} says that the round is done")
        stamps.append(json.loads(path.read_text(encoding="utf-8")))
    if stamps[0]["after"] != before:
        raise UserError(
            f"{here.path} was sampled from another model than what is before it now: delete it and "
            "the rounds after it to do them again"
        )
    return str(stamps[1]["id"])
