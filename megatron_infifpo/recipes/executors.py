"""Where nemo-run starts a stage: factories of executors by name, and a place for a site's own.

A site registers a factory in the entry-point group `megatron_infifpo.executors` of a package of its
own, or adds it to `EXECUTORS`. It is called with the nodes, the ranks of a node, and whatever the
command line gives it as `NAME.KEY=VALUE`.
"""

import inspect
import os
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import nemo_run as run

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.job import SHELL


def local(nodes: int, ranks: int) -> run.LocalExecutor:
    """Run on this machine, under torchrun where there are several ranks.

    Args:
        nodes: 1.
        ranks: processes.

    Raises:
        UserError: more than one node.
    """
    if nodes != 1:
        raise UserError(f"the local executor has 1 node, but --nodes is {nodes}: use slurm")
    launcher = "torchrun" if ranks > 1 else None
    # This environment's python and torchrun, activated or not.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return run.LocalExecutor(ntasks_per_node=ranks, launcher=launcher, env_vars={"PATH": path})


def slurm(
    nodes: int,
    ranks: int,
    account: str = os.environ.get("SBATCH_ACCOUNT", ""),
    partition: str | None = os.environ.get("SBATCH_PARTITION"),
    time: str = "04:00:00",
    gpus: int | None = None,
    container: str | None = None,
    mounts: str = "",
    setup: str | None = None,
    retries: int = 3,
) -> run.SlurmExecutor:
    """Submit to the SLURM of this machine; srun starts the ranks, in a container if one is named.

    Args:
        nodes: of the job.
        ranks: tasks of a node.
        account: the account to charge (default: SBATCH_ACCOUNT).
        partition: where to run (default: SBATCH_PARTITION, else the cluster's).
        time: limit of a job, HH:MM:SS.
        gpus: of a node (default: one a rank; 0: none are asked for).
        container: an image for pyxis.
        mounts: of the container, separated by commas.
        setup: shell lines before the command, such as `source venv/bin/activate`.
        retries: how often a failed job is queued again.

    Raises:
        UserError: no account.
    """
    if not account:
        raise UserError("nemo-run needs a SLURM account: give slurm.account=NAME or SBATCH_ACCOUNT")
    asked = ranks if gpus is None else gpus
    here = shlex.quote(os.getcwd())
    lines = [f"source {shlex.quote(str(SHELL / 'srun.sh'))}", *([setup] if setup else [])]
    return run.SlurmExecutor(
        account=account,
        partition=partition,
        time=time,
        nodes=nodes,
        ntasks_per_node=ranks,
        gpus_per_node=asked or None,
        exclusive=True if asked else None,
        mem="0" if asked else None,
        # nemo-run quotes none of these for the shell that reads them.
        container_image=container and shlex.quote(container),
        container_mounts=[shlex.quote(mount) for mount in mounts.split(",") if mount],
        setup_lines="\n".join(lines),
        retries=retries,
        # The job runs where it is submitted from: same files, same paths, nothing copied.
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        srun_args=["--wait=60", f"--chdir={here}"],
        poll_estimated_start_time=False,
    )


EXECUTORS: dict[str, Callable[..., Any]] = {"local": local, "slurm": slurm}


def executor(name: str, nodes: int, ranks: int, **options: Any) -> Any:
    """Make an executor by name, the site's own included.

    Raises:
        UserError: there is none of that name, or it does not take such options.
    """
    known = EXECUTORS | {
        point.name: point.load() for point in entry_points(group="megatron_infifpo.executors")
    }
    if name not in known:
        raise UserError(f"--executor is {name!r}, expected one of here, {', '.join(known)}")
    try:
        inspect.signature(known[name]).bind(nodes, ranks, **options)
    except TypeError as error:  # not one of the executor's own
        raise UserError(f"executor {name!r}: {error}") from None
    return known[name](nodes, ranks, **options)
