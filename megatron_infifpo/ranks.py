"""Which rank this process is, where srun or torchrun started it."""

import os
import re
from collections.abc import MutableMapping


def rank() -> int:
    """This process's rank, also before torch.distributed runs; alone: 0."""
    return int(os.environ.get("RANK", "0"))


def rank_and_size() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says; alone: 0 of 1."""
    return rank(), int(os.environ.get("WORLD_SIZE", "1"))


def ranks_from_srun(environment: MutableMapping[str, str]) -> None:
    """Say in torchrun's variables which rank this is, where srun started it.

    Only srun's own tasks have the count of a step: a batch script, which has the rest of SLURM's
    variables, runs what it starts itself alone. The first rank is on the step's first node, which
    is not where srun runs if that is a login node.
    """
    if "WORLD_SIZE" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    tasks = _tasks_of_nodes(environment.get("SLURM_STEP_TASKS_PER_NODE", environment["WORLD_SIZE"]))
    node = min(int(environment.get("SLURM_NODEID", "0")), len(tasks) - 1)
    environment["LOCAL_WORLD_SIZE"] = str(tasks[node])
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    first = _first_node(nodes) if nodes else environment.get("SLURM_LAUNCH_NODE_IPADDR")
    environment.setdefault("MASTER_ADDR", first or "localhost")
    port = _port(int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"]))
    environment.setdefault("MASTER_PORT", str(port))


def _tasks_of_nodes(text: str) -> list[int]:
    """Tasks of each node, from SLURM's `8,4(x2)`: 8 on the first, 4 on each of the next two."""
    found: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        found += [int(count)] * int(times or 1)
    return found


def _first_node(nodes: str) -> str:
    """First host of SLURM's `node[03-05,7],login1`: node03. Names may have several brackets."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


def _port(job: int, step: int) -> int:
    """A port of the step's own, below those that systems give to outgoing connections.

    The number of ports is prime, so the same step of two jobs has the same one only if their ids
    are a multiple of that apart; the factor keeps other steps of jobs nearby away.
    """
    return 12000 + (job * 10294 + step) % 20759
