"""What every command shares: errors of the user are one sentence and exit code 2."""

import errno
import os
import sys
from collections.abc import Callable

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


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 on success, 2 with one sentence on `UserError`."""
    try:
        sys.exit(main() or 0)
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
