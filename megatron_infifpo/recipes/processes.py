"""Processes of stages, and what signals do to them."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.ends import StageError, StoppedError

Start = Callable[[list[str], Path], int]
"""Runs a command, its output appended to a file; returns its exit code."""
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # go to the stage, as SIGTERM


def begun(words: list[str]) -> str:
    """The line that begins what an attempt of a stage prints into its log."""
    return f"$ {shlex.join(words)}"


def found(words: list[str], environment: Mapping[str, str]) -> list[str]:
    """Put the whole path of a program: this environment's torchrun, activated or not.

    What srun starts has its own PATH.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    return [shutil.which(words[0], path=path) or words[0], *words[1:]]


@contextmanager
def stoppable(environment: Mapping[str, str]) -> Iterator[Start]:
    """Yield what runs a command; after SIGTERM, SIGINT, SIGHUP or SIGUSR1 it starts no further one.

    All but SIGUSR1 go to the stage that runs, as SIGTERM, at which training saves. SIGUSR1 leaves
    it alone: who sends that ends srun's steps himself, since srun kills its own at once where it
    gets SIGTERM.

    Raises:
        StoppedError: a stage is not done after such a signal.
    """
    children: set[subprocess.Popen[bytes]] = set()  # stages may run side by side, in threads
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        again = number in stopped and number == signal.SIGINT  # would kill what is saving
        stopped.append(number)
        if number in ENDING and not again:
            for process in tuple(children):
                process.send_signal(signal.SIGTERM)

    def run(words: list[str], log: Path) -> int:
        if stopped:
            return -stopped[0]
        with log.open("ab") as file:
            file.write(f"{begun(words)}\n".encode())
            file.flush()
            words = found(words, environment)
            try:
                # A group of its own: a terminal's Ctrl-C, which it would not survive, is for us.
                process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                    env=dict(environment), process_group=0,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"cannot start {words[0]}: {error.strerror}") from None
        children.add(process)
        if set(stopped) & set(ENDING):  # between the question above and now
            process.send_signal(signal.SIGTERM)
        code = process.wait()
        children.discard(process)
        return code

    before = {
        each: signal.signal(each, stop)
        for each in (*ENDING, signal.SIGUSR1)
        if signal.getsignal(each) != signal.SIG_IGN  # nohup's
    }
    try:
        yield run
    except StageError as error:
        if stopped:
            raise StoppedError(stopped[0], error.place) from None
        error.show()
        raise
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
