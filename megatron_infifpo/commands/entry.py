"""What every command begins with: its rank, safe loading, and errors in one sentence."""

import os
import select
import sys
import time
from collections.abc import Callable

from megatron_infifpo.errors import user_errors
from megatron_infifpo.ranks import rank, ranks_from_srun

# Where all ranks stop, the first says why; a launcher that sees another end at once would kill it.
FIRST_SPEAKS_S = 2.0


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 on success, else as `user_errors` says."""
    ranks_from_srun(os.environ)
    # PyTorch's checkpoint reader would unpickle objects of any kind.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        _run(main)
    except SystemExit as end:
        if rank() and end.code == 2:
            time.sleep(FIRST_SPEAKS_S)
        raise


def _run(main: Callable[[], int | None]) -> None:
    with user_errors(f"[rank {rank()}] " if rank() else ""):
        try:
            code = main() or 0
            sys.stdout.flush()
        except BrokenPipeError:
            if _read_on(sys.stdout.fileno()):
                raise
            # Whoever read this has gone, as `head` does; Python flushes once more when it exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        sys.exit(code)


def _read_on(descriptor: int) -> bool:
    """Whether what is written to a file or a pipe can still be read."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))
