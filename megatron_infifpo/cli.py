"""What every command shares: errors of the user are one sentence and exit code 2."""

import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user gave is wrong.

    The message says what and where, what was expected, and how to fix it. Commands print it as one
    sentence and exit with code 2; any other exception is a defect of ours and keeps its traceback.
    """


def run(main: Callable[[], int | None]) -> None:
    """Run a command's `main` and exit: 0 on success, 2 with one sentence on `UserError`."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        prefix = "" if rank == "0" else f"[rank {rank}] "
        print(f"{prefix}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
