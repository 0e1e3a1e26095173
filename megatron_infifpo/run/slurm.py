"""A run as a chain of SLURM jobs: one a stage, which starts when those before it have succeeded.

A job's script is OUT/stages/STAGE/job.sh; its ranks are started by srun.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.job import PROGRAM, SHELL, flag_words
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.schema import Run
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.run.stamps import Known, know
from megatron_infifpo.storage.aside import make_folder, write_text

SCRIPT, JOB = "job.sh", "job.json"
# States of a job that has not ended.
ALIVE = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")

_TEXT = """#!/bin/bash
# {name}, a stage of {output}; written by infifpo fuse.
set -euo pipefail
{setup}
source {shell}/srun.sh
source {shell}/resumable.sh
RETRIES={retries}

# Ranks have a minute after the first one ended: killing them would hide the code of who says why.
step() {{
  srun --wait=60 {words}
}}
resumable
"""


def submit(
    run: Run, stages: Sequence[Stage], file: Path, *, dry_run: bool = False
) -> dict[str, str]:
    """Submit what is not done, and not queued already; return the job of every stage.

    Args:
        run: what it is.
        stages: of it.
        file: the run.yaml that jobs read.
        dry_run: print the commands only.

    Raises:
        UserError: sbatch is not there, or refuses a job.
    """
    names = Names(Path(run.output))
    known, jobs = know(stages, names), dict[str, str]()
    for stage in stages:
        if known[stage.name].done and known[stage.name].other is None:
            continue
        job = None if dry_run else queued(names, stage.name)
        if job is None:
            after = [jobs[name] for name in stage.after if name in jobs]
            job = _submit(run, names, known[stage.name], file, after, dry_run)
        jobs[stage.name] = job
    return jobs


def queued(names: Names, name: str) -> str | None:
    """The job of a stage that has not ended; None where there is none."""
    path = names.stage(name) / JOB
    if not path.exists():
        return None
    job = str(json.loads(path.read_text(encoding="utf-8"))["job"])
    return job if state(job) in ALIVE else None


def state(job: str) -> str:
    """What SLURM says of a job; empty where it has forgotten it."""
    try:
        told = subprocess.run(
            ["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return told.stdout.strip().split("\n")[0]


def _submit(
    run: Run, names: Names, known: Known, file: Path, after: Sequence[str], dry_run: bool
) -> str:
    stage, folder = known.stage, names.stage(known.stage.name)
    script = folder / SCRIPT
    words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes", "--requeue"]
    words += ["--open-mode=append", f"--job-name={stage.name}", f"--output={folder}/%j.out"]
    words += [f"--chdir={Path.cwd()}", "--signal=B:USR1@600", *_size(run, stage)]
    words += [f"--dependency=afterok:{':'.join(after)}"] if after else []
    words += [w for name, value in run.cluster.sbatch.items() for w in flag_words(name, value)]
    if dry_run:
        print(shlex.join([*words, str(script)]))
        return stage.name
    make_folder(folder)
    write_text(script, _script(run, stage, file))
    try:
        done = subprocess.run([*words, str(script)], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("executor slurm needs sbatch, and it is not there") from None
    if done.returncode:
        raise UserError(f"sbatch refuses {stage.name}: {done.stderr.strip()}")
    job = done.stdout.strip().partition(";")[0]
    write_text(folder / JOB, json.dumps({"job": job}))
    return job


def _size(run: Run, stage: Stage) -> list[str]:
    """Nodes, tasks and GPUs of a job: a training has all nodes, scoring one, all else one task."""
    if not stage.job.every_rank:
        return ["--nodes=1", "--ntasks=1"]
    ranks, nodes = run.cluster.ranks, run.cluster.nodes if stage.trains else 1
    asked = {"gpus-per-node", "gres"} & run.cluster.sbatch.keys()
    gpus = [] if asked else [f"--gpus-per-node={ranks}"]
    return [f"--nodes={nodes}", f"--ntasks-per-node={ranks}", *gpus]


def _script(run: Run, stage: Stage, file: Path) -> str:
    cluster, python = run.cluster, sys.executable
    container: list[str] = []
    if cluster.container:
        container = [f"--container-image={cluster.container}"]
        container += [f"--container-mounts={cluster.mounts or os.getcwd()}"]
        container += [f"--container-workdir={os.getcwd()}"]
        python = "python"
    started = [python, "-u", "-m", PROGRAM, "fuse", str(file), "--only", stage.name, "--here"]
    alone = [] if stage.job.every_rank else ["--cpu-bind=none"]
    return _TEXT.format(
        name=stage.name, output=run.output, setup=cluster.setup, shell=shlex.quote(str(SHELL)),
        retries=cluster.retries, words=shlex.join([*container, *alone, *started]),
    )  # fmt: skip
