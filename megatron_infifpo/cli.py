"""What every command shares: ranks started by srun, and errors of the user in one sentence."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping

# The disk, the user's share of it, or the largest file allowed.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something the user gave is wrong.

    The message says what and where, what was expected, and how to fix it. Commands print it as one
    sentence and exit with code 2; any other exception is a defect of ours and keeps its traceback.
    """


def positive(text: str) -> int:
    """Read a flag's value that must be a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def ranks_from_srun(environment: MutableMapping[str, str]) -> None:
    """Say in torchrun's variables which rank this is, where srun started it.

    Only srun's own tasks have the count of a step: a batch script, which has the rest of SLURM's
    variables, runs what it starts itself alone. The first rank is on the node that srun ran on.
    """
    if "WORLD_SIZE" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    here = environment.get("SLURM_STEP_TASKS_PER_NODE", environment["WORLD_SIZE"])
    environment["LOCAL_WORLD_SIZE"] = re.split(r"\D", here)[0]  # "8(x2)": eight on both nodes
    environment.setdefault("MASTER_ADDR", environment.get("SLURM_LAUNCH_NODE_IPADDR", "localhost"))
    # A port of the job's own, below those that systems give to outgoing connections.
    step = int(environment["SLURM_JOB_ID"]) * 16 + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(20000 + step % 12000))


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
