"""Functions in processes of their own, with a time limit: one hang or crash ends nothing else."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TAIL = 40  # lines of a log that a report keeps
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "SLURM_STEP_NUM_TASKS",
)  # fmt: skip


class ProcessFailure(Exception):
    """A process failed or did not end; the message is one sentence.

    Attributes:
        log: the end of what it wrote.
    """

    def __init__(self, message: str, log: str = ""):
        """Take the sentence and the log."""
        super().__init__(message)
        self.log = log


def run(
    target: str,
    argument: Any,
    folder: Path,
    *,
    seconds: float,
    ranks: int = 1,
    environment: Mapping[str, str] | None = None,
    own_session: bool = False,
) -> list[Any]:
    """Call a function on so many ranks, each a new process, and return what JSON has of it.

    Args:
        target: `module:function`; it takes the argument, and returns what JSON can hold.
        argument: what JSON can hold.
        folder: for logs and results; made here.
        seconds: until the ranks are killed.
        ranks: with more than one, torchrun's variables are set.
        environment: more variables; an empty value removes nothing.
        own_session: whether all that it starts in turn ends with it.

    Raises:
        ProcessFailure: a rank failed, or they did not end in time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    processes = []
    try:
        for rank in range(ranks):
            variables = dict(os.environ) | dict(environment or {})
            for name in RANK_VARIABLES:  # of a job that this one runs in: its port is one for all
                variables.pop(name, None)
            if ranks > 1:
                variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port}
                variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
                variables["MASTER_ADDR"] = "127.0.0.1"
            processes.append(_start(target, argument, folder, rank, variables, own_session))
        codes = _wait(processes, time.monotonic() + seconds)
    finally:
        for process in processes:
            end(process, session=own_session)
    logs = [read_tail(folder / f"rank{rank}.log") for rank in range(ranks)]
    if None in codes:
        rank = codes.index(None)
        raise ProcessFailure(f"did not end within {seconds:.0f} s", logs[rank])
    bad = [rank for rank, code in enumerate(codes) if code]
    if bad:
        # The others were ended when the first one failed.
        rank = min(bad, key=lambda rank: codes[rank] == -signal.SIGKILL)
        message = f"{last_line(logs[rank])} (exit code {codes[rank]})"
        raise ProcessFailure(message if ranks == 1 else f"rank {rank}: {message}", logs[rank])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def _start(
    target: str, argument: Any, folder: Path, rank: int, variables: dict[str, str], session: bool
) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_infifpo.gpu_check"]
    command += [target, json.dumps(argument), str(folder / f"rank{rank}.json")]
    with open(folder / f"rank{rank}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=session,
            process_group=None if session else 0,
        )


def _wait(processes: Sequence[subprocess.Popen], deadline: float) -> list[int | None]:
    """Exit codes once all have ended, one has failed, or time is up; None: still running."""
    while True:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        if time.monotonic() > deadline:
            return codes
        time.sleep(0.05)
    if None in codes:  # one has failed: the others may say why, then wait for it for ever
        time.sleep(min(2.0, max(0.0, deadline - time.monotonic())))
        codes = [process.poll() for process in processes]
        for process, code in zip(processes, codes, strict=True):
            if code is None:
                end(process, session=False)
        codes = [process.wait() for process in processes]
    return codes


def end(process: subprocess.Popen, *, session: bool) -> None:
    """Kill what a process has started, and itself: saving a checkpoint leaves helpers behind.

    Args:
        process: a leader of its group, or of its session.
        session: kill all groups of its session.
    """
    everyone = [int(name) for name in os.listdir("/proc") if name.isdigit()] if session else []
    pids = [pid for pid in everyone if _session(pid) == process.pid]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return -1


def free_port() -> int:
    """A port that nobody listens on, and below those that outgoing connections get meanwhile."""
    while True:
        port = random.SystemRandom().randrange(11000, 20000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def read_tail(path: Path) -> str:
    """Last lines of a log."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return "\n".join(text.rstrip().splitlines()[-TAIL:])


def last_line(log: str) -> str:
    """What a log ends with, where an exception says what it is."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"
