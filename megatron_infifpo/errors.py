"""What a user can mend, in one sentence; every other exception is a defect of ours."""

import contextlib
import errno
import sys
from collections.abc import Iterator

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


@contextlib.contextmanager
def user_errors(prefix: str = "") -> Iterator[None]:
    """Run a command's code inside: end it with one sentence and exit code 2 on `UserError`.

    Args:
        prefix: of a `UserError`'s sentence, who says it.
    """
    try:
        yield
    except UserError as error:
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
