"""Real gloo ranks for tests: the client of zygote.py."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class RankError(AssertionError):
    """A rank failed; holds the exit codes and the logs of all ranks."""

    def __init__(self, codes: list[int], logs: list[str]):
        self.codes, self.logs = codes, logs
        tails = "\n".join(
            f"--- rank {i}, exit {codes[i]}\n{log[-3000:]}" for i, log in enumerate(logs)
        )
        super().__init__(f"ranks exited with {codes}\n{tails}")


class Ranks:
    """Runs a function on forked gloo ranks: `ranks(2, "module:function", *json_arguments)`."""

    def __init__(self, folder: Path, *command: str):
        """Take a folder for logs and results, and what to start if not plainly the zygote."""
        self.folder = folder
        self.count = 0
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, *(command or ["-m", "support.zygote"])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        self.requests, self.answers = stdin, stdout
        self.logs: list[str] = []

    def __call__(self, world: int, target: str, *args) -> list:
        """Return every rank's result; raise RankError if one failed. `logs` keeps the output."""
        self.count += 1
        output = self.folder / f"{self.count:03d}"
        output.mkdir(parents=True)
        request = {"world": world, "target": target, "args": args, "output": str(output)}
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        answer = self.answers.readline()
        assert answer, "the zygote died: run tests/support/zygote.py by hand to see why"
        codes = json.loads(answer)
        logs = [output / f"rank{i}.log" for i in range(world)]
        self.logs = [log.read_text() if log.exists() else "" for log in logs]
        if any(codes):
            raise RankError(codes, self.logs)
        results = [output / f"rank{i}.pickle" for i in range(world)]
        # A rank that exits with code 0 by itself, as after --help, leaves none.
        return [pickle.loads(r.read_bytes()) if r.exists() else None for r in results]

    def close(self) -> None:
        self.requests.close()
        self.process.wait(30)


def refused(ranks, module: str, argv: list[str]) -> str:
    """Run a command that must exit with code 2, and return its sentence."""
    with pytest.raises(RankError) as failure:
        ranks(1, "support.tools:command", module, argv)
    assert failure.value.codes == [2], failure.value
    log = failure.value.logs[0]
    assert "Traceback" not in log
    sentences = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 1, log
    return sentences[0]
