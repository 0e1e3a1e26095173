"""How a stage ended: done, for a person to mend, or to be tried again."""

import re
import sys
import textwrap
from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.rounds.stages import Stage

TAIL = 15  # lines of a failed stage's log that are shown where none says what is wrong
_SAID = re.compile(r"^(?:\[rank \d+\] )?error: .*(?:\n {7}.*)*", re.MULTILINE)
_WORKER = re.compile(r"^\s*exitcode\s*: 2\b", re.MULTILINE)


class StageError(RuntimeError):
    """A stage ended before it was done, for a reason that may pass: it was killed, say."""


def check_end(folder: Path, stage: Stage, code: int, log: Path, begun: str) -> None:
    """Refuse a stage that is not done, and show what it said.

    Args:
        folder: of the round.
        stage: that ended.
        code: of its end.
        log: what it printed, after that of earlier attempts.
        begun: the line that begins each attempt's.

    Raises:
        UserError: it ended with 2: a person must mend it.
        StageError: it ended otherwise.
    """
    if code == 0 and stage.done:
        return
    print(flush=True)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    text = text.rpartition(f"{begun}\n")[2]
    said = dict.fromkeys(_SAID.findall(text)) or text.splitlines()[-TAIL:]
    print(textwrap.indent("\n".join(said), "    "), file=sys.stderr)
    if code > 0 and _WORKER.search(text):  # torchrun's own is 1, whatever its workers' are
        code = 2
    how = f"ended with {code}" if code else f"ended without {stage.missing}"
    if stage.step is not None and not code:
        how = f"stopped at step {stage.at} of {stage.step}"
    ended = f"{folder.name}: the stage {stage.name} {how}, see {log}"
    if code == 2:
        raise UserError(ended)
    raise StageError(f"{ended}; the same command goes on with it")
