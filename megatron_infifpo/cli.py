"""What every command shares: ranks started by srun, and errors of the user in one sentence."""

import argparse
import contextlib
import errno
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping

# The disk, the user's share of it, or the largest file allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What a path of the user's can be, beside absent: only a person can mend it.
UNUSABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR,
)  # fmt: skip


class UserError(ValueError):
    """Something the user gave is wrong.

    The message says what and where, what was expected, and how to fix it. Commands print it as one
    sentence and exit with code 2; any other exception is a defect of ours and keeps its traceback.
    """


def positive(text: str) -> int:
    """Read a flag's value that must be a whole number above 0."""
    return whole(1)(text)


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Make a reader of a flag's value: a whole number, `least` to `most`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected a whole number of at least {least}, {most} at most"
        )

    return read


def real(least: float, most: float = math.inf) -> Callable[[str], float]:
    """Make a reader of a flag's value: a finite number, `least` to `most`."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(float(text)) and least <= float(text) <= most:
                return float(text)
        high = "" if math.isinf(most) else f", {most:g} at most"
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least {least:g}{high}")

    return read


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


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Run a command's code inside: end it with one sentence and exit code 2 on `UserError`."""
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "" if rank == "0" else f"[rank {rank}] "
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except OSError as error:
        if error.errno in UNUSABLE and error.filename is not None:
            print(
                f"error: cannot use {error.filename}: {error.strerror}", file=sys.stderr, flush=True
            )
            sys.exit(2)
        if error.errno not in FULL:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"error: no space left on the disk{where}; free some and run the command again: "
            "nothing half-written has a final name",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 on success, else as `user_errors` says."""
    ranks_from_srun(os.environ)
    # PyTorch's checkpoint reader would unpickle objects of any kind.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    with user_errors():
        sys.exit(main() or 0)
