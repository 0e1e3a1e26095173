"""The table of stages: how each stands, how far it is, how long it takes yet.

On a terminal it is drawn again and again in its place; elsewhere a line says what begins and ends,
and once a minute how far it is.
"""

import shutil
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import TracebackType

from megatron_infifpo.run.names import Names
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.run.stamps import LOG, progress

DONE, RUNNING, FAILED, WAITING = "done", "running", "failed", "waits"
EVERY = 60.0  # seconds from one line about progress to the next


@dataclass
class Row:
    """How a stage stands."""

    state: str
    began: float = 0.0
    seconds: float | None = None


def table(rows: Sequence[tuple[str, str, float | None, float | None]]) -> list[str]:
    """Lines of a table.

    Args:
        rows: a stage's name, its state, how much of it is done (0 to 1), and seconds: that it has
            taken, or takes yet where it runs.
    """
    width = max([5, *(len(name) for name, *_ in rows)]) + 2
    lines = [f"{'stage':<{width}}{'state':<10}{'progress':>8}{'time':>10}"]
    for name, state, share, seconds in rows:
        part = "" if share is None else f"{share:.0%}"
        text = "" if seconds is None else clock(seconds) + " left" * (state == RUNNING)
        lines.append(f"{name:<{width}}{state:<10}{part:>8}{text:>10}".rstrip())
    return lines


def clock(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3:07, 2:15:00."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes = f"{rest // 60:02d}:{rest % 60:02d}"
    return f"{hours}:{minutes}" if hours else minutes.lstrip("0")


def left(share: float | None, elapsed: float) -> float | None:
    """Seconds that a stage takes yet, if it goes on as it has begun."""
    return elapsed * (1 - share) / share if share else None


class Board:
    """Shows how the stages stand while they run."""

    def __init__(self, names: Names, stages: Sequence[Stage], done: Collection[str]) -> None:
        """Take all stages; those that are done are skipped."""
        self.names = names
        self.rows = {stage.name: Row(DONE if stage.name in done else WAITING) for stage in stages}
        self.live = sys.stdout.isatty()
        self.drawn, self.said = 0, time.monotonic()

    def __enter__(self) -> "Board":
        """Show the table."""
        if self.live:
            self.show()
        else:
            skipped = [name for name, row in self.rows.items() if row.state == DONE]
            if skipped:
                print(f"done already: {', '.join(skipped)}", flush=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show how all ended."""
        if self.live:
            self.show()
        elif any(row.seconds for row in self.rows.values()):
            print("\n".join(self._lines()), flush=True)

    def begin(self, stage: Stage) -> None:
        """A stage begins."""
        self.rows[stage.name] = Row(RUNNING, time.monotonic())
        self._say(f"{stage.name} ...")

    def end(self, stage: Stage, seconds: float) -> None:
        """A stage is done."""
        row = self.rows[stage.name]
        row.state, row.seconds = DONE, seconds
        self._say(f"{stage.name}: done in {clock(seconds)}")

    def fail(self, stage: Stage) -> None:
        """A stage ended, and is not done."""
        self.rows[stage.name].state = FAILED
        self._say(f"{stage.name}: failed")

    def show(self) -> None:
        """Draw the table, or once in a while say how far it is."""
        if self.live:
            lines = self._lines()[: shutil.get_terminal_size().lines - 1]
            above = f"\x1b[{self.drawn}A" if self.drawn else ""
            sys.stdout.write(above + "".join(f"\x1b[2K{line}\n" for line in lines))
            sys.stdout.flush()
            self.drawn = len(lines)
        elif time.monotonic() - self.said > EVERY:
            for name, row in self.rows.items():
                if row.state == RUNNING:
                    share, seconds = self._progress(name, row)
                    part = "" if share is None else f", {share:.0%}"
                    rest = "" if seconds is None else f", {clock(seconds)} left"
                    self._say(f"{name} runs{part}{rest}")

    def _say(self, text: str) -> None:
        if not self.live:
            self.said = time.monotonic()
            print(text, flush=True)

    def _lines(self) -> list[str]:
        found = []
        for name, row in self.rows.items():
            share, seconds = self._progress(name, row)
            found.append((name, row.state, share, seconds))
        return table(found)

    def _progress(self, name: str, row: Row) -> tuple[float | None, float | None]:
        if row.state != RUNNING:
            return None, row.seconds
        share = progress(self.names.stage(name) / LOG)
        return share, left(share, time.monotonic() - row.began)
