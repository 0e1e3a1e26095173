"""How a stage ended: done, for a person to mend, or to be tried again."""

import re
import signal
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_infifpo.errors import UserError

if TYPE_CHECKING:
    from megatron_infifpo.rounds.stages import Stage

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
    """Rounds were stopped by a signal, and go on when they are started again.

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


def check_end(folder: Path, stage: "Stage", code: int, log: Path, begun: str) -> None:
    """Refuse a stage that is not done.

    Args:
        folder: of the round.
        stage: that ended.
        code: of its end.
        log: what it printed, after that of earlier attempts.
        begun: the line that begins each attempt's.

    Raises:
        UserError: it ended with 2: a person must mend it; what it said is shown.
        StageError: it ended otherwise.
    """
    if code == 0 and stage.done:
        return
    print(flush=True)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    text = text.rpartition(f"{begun}\n")[2]
    said = dict.fromkeys(_SAID.findall(text)) or text.splitlines()[-TAIL:]
    if code > 0 and _WORKER.search(text):  # torchrun's own is 1, whatever its workers' are
        code = 2
    how = f"ended with {code}" if code else f"ended without {stage.missing}"
    if stage.step is not None and not code:
        how = f"stopped at step {stage.at} of {stage.step}"
    ended = f"{folder.name}: the stage {stage.name} {how}, see {log}"
    number = re.fullmatch(r"round-(\d+)", folder.name)
    place = f"round {int(number[1])}, {stage.name}" if number else stage.name
    error = StageError(f"{ended}; the same command goes on with it", place, said)
    if code == 2:
        error.show()
        raise UserError(ended)
    raise error
