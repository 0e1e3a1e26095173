"""Start stages: here, as the process's own command, or by nemo-run."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_positive, check_types
from megatron_infifpo.recipes.commands import STAGES
from megatron_infifpo.recipes.job import Job
from megatron_infifpo.recipes.options import SEVERAL, read_site_options


@dataclass(frozen=True)
class Launch:
    """What is started, and where.

    Attributes:
        name: a stage, or one of `SEVERAL`.
        options: of the stage.
        executor: nemo-run's, or "here".
        site: options of the executor, as `EXECUTOR.NAME=VALUE`.
        nodes, ranks: how many of a node.
        dry_run: print only.
        detach: submit, and do not wait for the end.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    executor: str = "here"
    site: tuple[str, ...] = ()
    nodes: int = 1
    ranks: int = 8
    dry_run: bool = False
    detach: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot be started.

        Raises:
            UserError: an unknown stage, or an option that has no effect here.
        """
        check_types(self)
        check_positive(self, "nodes", "ranks")
        if self.name not in (*STAGES, *SEVERAL):
            known = ", ".join((*STAGES, *SEVERAL))
            raise UserError(f"there is no stage {self.name!r}, expected one of {known}")
        if self.executor != "here":
            return
        several_nodes = ["--nodes"] * (self.nodes > 1)
        if unused := [*self.site, *several_nodes, *(["--detach"] * self.detach)]:
            raise UserError(f"{', '.join(unused)} has no effect here: choose an --executor")
        if self.name in SEVERAL:
            raise UserError(f"{self.name} is several commands: choose an --executor, or a stage")


def launch(job: Launch) -> int:
    """Start a stage, or several; return the exit code. A stage that starts here never returns.

    Raises:
        UserError: nemo-run cannot start it.
    """
    if job.executor != "here":
        return _by_nemo_run(job)
    _here(STAGES[job.name](**job.options), dry_run=job.dry_run)
    return 0


def _here(job: Job, *, dry_run: bool) -> None:
    """Become the job's command."""
    if dry_run or os.environ.get("SLURM_PROCID", "0") == "0":
        print(job, flush=True)
    if not dry_run:
        os.execv(sys.executable, [sys.executable, *job.python_words])


def _by_nemo_run(job: Launch) -> int:
    """Start by nemo-run; return 1 if a job failed while it was waited for.

    Raises:
        UserError: nemo-run is not installed, or an executor's option is not one.
    """
    try:
        import nemo_run

        from megatron_infifpo.recipes import tasks
        from megatron_infifpo.recipes.executors import EXECUTORS, executor
    except ImportError as error:
        raise UserError(
            f"--executor {job.executor} needs nemo-run ({error}): "
            "pip install 'megatron-infifpo[recipes]'"
        ) from None
    site = read_site_options(job.executor, job.site, EXECUTORS.get(job.executor))
    every_rank = executor(job.executor, job.nodes, job.ranks, **site)
    alone = executor(job.executor, 1, 1, **site)
    pipelines = {"pipeline": tasks.infifpo_pipeline, "fusion": tasks.fusion_pipeline}
    if job.name in pipelines:
        experiment = pipelines[job.name](alone, every_rank, **job.options)
    else:
        if job.name == "baselines":
            made, where = tasks.baselines(**job.options), every_rank
        else:
            stage = STAGES[job.name](**job.options)
            made, where = (
                {tasks.title(stage): tasks.task(stage)},
                every_rank if stage.every_rank else alone,
            )
        experiment = nemo_run.Experiment(job.name)
        with experiment:
            for name, task in made.items():
                experiment.add(task, executor=where.clone(), name=name)
    with experiment:
        if job.dry_run:
            experiment.dryrun()
            return 0
        experiment.run(detach=job.detach)
    failed = [one.id for one in experiment.jobs if one.state.name in ("FAILED", "CANCELLED")]
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are named above", file=sys.stderr)
    return 1 if failed else 0
