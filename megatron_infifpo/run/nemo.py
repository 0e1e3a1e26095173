"""A run through nemo-run: an experiment of its stages, and `nemorun infifpo fuse`.

    nemorun infifpo fuse file=run.yaml executor=infifpo_slurm executor.account=research

In a program of your own:

    experiment = fuse_experiment("run.yaml", alone=my_executor, every_rank=my_other_executor)
    experiment.run()
"""

from pathlib import Path
from typing import Any

import nemo_run

from megatron_infifpo.recipes.executors import local, slurm
from megatron_infifpo.recipes.job import Job
from megatron_infifpo.recipes.tasks import experiment_of
from megatron_infifpo.run.driver import write_sources
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.reading import read_run
from megatron_infifpo.run.stamps import know
from megatron_infifpo.run.start import keep, plan


def fuse_experiment(file: str, alone: Any, every_rank: Any) -> nemo_run.Experiment:
    """Build an experiment of the stages of a run that are not done.

    Args:
        file: run.yaml.
        alone: executor of stages that are one process.
        every_rank: executor of training and scoring; `cluster.ranks` in the file says of how many.

    Raises:
        UserError: the file is wrong, or all is done.
    """
    run = read_run(file)
    stages, names = plan(run), Names(Path(run.output))
    known = know(stages, names)
    left = [each.stage for each in known.values() if not each.done]
    kept = keep(run, file)
    write_sources(run, names)
    waits = {stage.name for stage in left}
    pipeline = []
    for stage in left:
        words = ("fuse", str(kept), "--only", stage.name, "--here")
        job = Job(stage.name, words, every_rank=stage.job.every_rank)
        pipeline.append((job, [name for name in stage.after if name in waits]))
    return experiment_of("fuse", pipeline, alone, every_rank)


@nemo_run.cli.factory(target=nemo_run.Executor, target_arg="executor", name="infifpo_local")
def _local(ranks: int = 1) -> nemo_run.LocalExecutor:
    return local(1, ranks)


@nemo_run.cli.factory(target=nemo_run.Executor, target_arg="executor", name="infifpo_slurm")
def _slurm(nodes: int = 1, ranks: int = 8, account: str = "") -> nemo_run.SlurmExecutor:
    return slurm(nodes, ranks, account=account) if account else slurm(nodes, ranks)


@nemo_run.cli.entrypoint(namespace="infifpo", type="experiment")
def fuse(ctx: nemo_run.cli.RunContext, file: str = "run.yaml") -> None:
    """Make the run of a file, with the executor that is given."""
    every_rank = ctx.executor or local(1, 1)
    alone = every_rank.clone()
    alone.ntasks_per_node = 1
    if isinstance(alone, nemo_run.LocalExecutor):
        alone.launcher = None
    elif isinstance(alone, nemo_run.SlurmExecutor):
        alone.nodes = 1
    ctx.launch(fuse_experiment(file, alone, every_rank))
