"""One run at a time in a --save folder.

The lock is the operating system's, on a small file in the folder: it goes when its process does,
however that ends, so a job that is queued again never finds one left over. It works over NFS, and
over Lustre unless that is mounted without locks; there a warning says that nothing is guarded.
"""

import errno
import fcntl
import os
import socket
import time
import warnings
from pathlib import Path
from typing import IO

from megatron_infifpo.errors import UserError

LOCK_FILE = ".run.lock"
_UNKNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class RunLock:
    """The right to write to a folder; the first rank holds it until the process ends."""

    def __init__(self, folder: str | Path, flag: str = "--save") -> None:
        """Name the folder, and the flag that gave it; nothing is locked yet."""
        self.path, self.flag = Path(folder) / LOCK_FILE, flag
        self.held: IO[str] | None = None

    def try_early(self) -> None:
        """Lock a folder that has been run in before; leaves every other one as it is.

        Raises:
            UserError: another run holds it.
        """
        if self.path.is_file():
            self.take()

    def take(self) -> None:
        """Lock the folder, which is there; does nothing if it is locked by this object.

        Raises:
            UserError: another run holds it; says which.
        """
        if self.held is not None:
            return
        file = open(self.path, "a+", encoding="utf-8")
        try:
            # Not flock: children of a fork would hold it, and outlive this process.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNKNOWN:
                warnings.warn(
                    f"{self.path.parent} has no locks ({error.strerror}): nothing keeps a second "
                    "run out of it",
                    stacklevel=2,
                )
                self.held = file
                return
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{self.flag} {self.path.parent} is in use by {holder}: two runs would mix what "
                f"they write; wait for it, end it, or choose another {self.flag}"
            ) from None
        file.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
        self.held = file


def held(folder: str | Path) -> bool:
    """Whether a run holds a folder; false where its file system has no locks."""
    try:
        with open(Path(folder) / LOCK_FILE, "r+", encoding="utf-8") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return error.errno not in _UNKNOWN
    return False
