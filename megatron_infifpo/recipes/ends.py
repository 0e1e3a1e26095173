"""How a stage ended: done, for a person to mend, or to be tried again."""

import re
import signal
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from megatron_infifpo.errors import UserError

TAIL = 15  # lines of a failed stage's log that are shown where none says what is wrong
_SAID = re.compile(r"^(?:\[rank \d+\] )?error: .*(?:\n {7}.*)*", re.MULTILINE)
_WORKER = re.compile(r"^\s*exitcode\s*: 2\b", re.MULTILINE)


class StageError(RuntimeError):
    """A stage ended before it was done, for a reason that may pass: it was killed, say.

    Attributes:
        place: which one it is, in words.
    """

    def __init__(self, message: str, place: str, said: Iterable[str]) -> None:
        """Keep what of its log says why, for `show`."""
        super().__init__(message)
        self.place, self._said = place, said

    def show(self) -> None:
        """Print what its log says."""
        print(textwrap.indent("\n".join(self._said), "    "), file=sys.stderr)


class StoppedError(RuntimeError):
    """Stages were stopped by a signal, and go on when they are started again.

    Attributes:
        code: to exit with.
    """

    def __init__(self, number: int, place: str) -> None:
        """Say where.

        Args:
            number: of the signal.
            place: which stage is not done, in words.
        """
        interrupted = number == signal.SIGINT
        how = "interrupted" if interrupted else "stopped"
        super().__init__(f"{how} in {place}; the same command goes on")
        self.code = 130 if interrupted else 1


def real_code(code: int, log: Path, begun: str) -> int:
    """The code of a stage's end: torchrun's own is 1, whatever its workers' are.

    Args:
        code: of the process.
        log: what it printed, after that of earlier attempts.
        begun: the line that begins each attempt's.
    """
    return 2 if code > 0 and _WORKER.search(_text(log, begun)) else code


def refuse(ended: str, place: str, code: int, log: Path, begun: str) -> NoReturn:
    """Refuse a stage that is not done.

    Args:
        ended: how it ended, and where its log is.
        place: which one it is.
        code: as `real_code` returns it.
        log, begun: see there.

    Raises:
        UserError: the code is 2: a person must mend it; what it said is shown.
        StageError: else.
    """
    text = _text(log, begun)
    said = dict.fromkeys(_SAID.findall(text)) or text.splitlines()[-TAIL:]
    error = StageError(f"{ended}; the same command goes on with it", place, said)
    if code == 2:
        error.show()
        raise UserError(ended)
    raise error


def _text(log: Path, begun: str) -> str:
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return text.rpartition(f"{begun}\n")[2]
