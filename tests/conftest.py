"""Fixtures shared by all tests: shared data, real ranks, tiny models."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real preference pairs and tokenizers; see INFIFPO_TEST_DATA in the README."""
    path = Path(os.environ.get("INFIFPO_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no test data in {path}: set INFIFPO_TEST_DATA")
    return path


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

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        self.logs: list[str] = []

    def __call__(self, world: int, target: str, *args) -> list:
        """Return every rank's result; raise RankError if one failed. `logs` keeps the output."""
        self.count += 1
        output = self.folder / f"{self.count:03d}"
        output.mkdir(parents=True)
        request = {"world": world, "target": target, "args": args, "output": str(output)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the zygote died: run tests/zygote.py by hand to see why"
        codes = json.loads(answer)
        self.logs = [(output / f"rank{i}.log").read_text() for i in range(world)]
        if any(codes):
            raise RankError(codes, self.logs)
        results = [(output / f"rank{i}.pickle").read_bytes() for i in range(world)]
        return [pickle.loads(result) for result in results]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Real gloo ranks, forked from one process that has imported everything."""
    launcher = Ranks(tmp_path_factory.mktemp("ranks"))
    yield launcher
    launcher.close()


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as the demo's pivot; INFIFPO_SMOLLM2 names a folder to keep it in."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    import pivot

    folder = os.environ.get("INFIFPO_SMOLLM2") or tmp_path_factory.mktemp("smollm2") / "hf"
    try:
        return pivot.save_pivot(folder)
    except ValueError as error:
        pytest.skip(str(error))
