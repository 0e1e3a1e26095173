"""A chain of jobs, one a round, whose stages are stand-ins: preempted, it ends as one alone."""

import shlex
import sys
from pathlib import Path

import pytest

from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.rounds.run import run_rounds
from support.launcher import ROOT
from support.round_stages import StandIn, content, write_inputs
from support.slurm_cluster import wait_until

pytestmark = pytest.mark.slurm
SCRIPTS = ROOT / "examples" / "slurm"

# The driver is the real one, and every stage is a stand-in.
PYTHON = """#!/bin/bash
case "$*" in
  *" rounds "*) exec {python} "$@" ;;
  *) exec {python} -m support.round_stages "$@" ;;
esac
"""


def options(folder: Path) -> dict[str, str]:
    return {
        "label": f"--program {folder}/judge.py:score",
        "train": "--lr 1e-6 --global-batch-size 4 --micro-batch-size 1 --seq-length 64",
    }


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """What rounds.sbatch reads from env.sh, with two ranks on two nodes."""
    write_inputs(tmp_path)
    sources = (tmp_path / "sources.yaml").read_text()
    (tmp_path / "sources.yaml").write_text(sources.replace("model: ", f"model: {tmp_path}/"))
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f'export PATH="{folder}:$PATH"\n')
    (folder / "python").write_text(PYTHON.format(python=sys.executable))
    (folder / "python").chmod(0o755)
    given = options(tmp_path).items()
    words = (
        f"--prompts {tmp_path}/prompts.jsonl --sources {tmp_path}/sources.yaml --method fuserlhf "
        "--rounds 2 --steps 5 --round-prompts 4 --count 3 "
        + " ".join(f"--{stage}-options {shlex.quote(text)}" for stage, text in given)
    )
    return {
        "VENV": str(tmp_path / "venv"), "NODES": "2", "RANKS": "1", "RUN": str(tmp_path / "run"),
        "PIVOT": str(tmp_path / "hf"), "ROUNDS": words, "LOGS": str(tmp_path / "logs"),
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests", "INFIFPO_ENV": str(SCRIPTS / "env.sh"),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def logs(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted((folder / "logs").glob("*")))


def test_chain(cluster, environment, tmp_path, monkeypatch):
    """Two jobs; the second is preempted as it trains, and is queued again."""
    monkeypatch.chdir(ROOT)
    waits = tmp_path / "run" / "rounds" / "round-001" / "wait"
    printed = cluster.run("bash", SCRIPTS / "rounds.sh", "2", **environment, HOLD=str(waits))
    first, second = printed.splitlines()[0].split()[1:]
    assert cluster.wait(first, 120) == "COMPLETED", logs(tmp_path)
    wait_until(waits.exists, 60, "the training of round 1")
    cluster.run("scancel", "--batch", "--signal=USR1", second)
    assert cluster.wait(second, 200) == "COMPLETED", logs(tmp_path)
    restarts = [cluster.job(job)["Restarts"] for job in (first, second)]
    assert restarts == ["0", "1"]
    rounds = tmp_path / "run" / "rounds"
    assert len((rounds / "rounds.jsonl").read_text().splitlines()) == 2
    waits.unlink()
    job = RoundsJob(
        output=tmp_path / "alone", pivot=str(tmp_path / "hf"), method="fuserlhf",
        prompts=[str(tmp_path / "prompts.jsonl")], sources=str(tmp_path / "sources.yaml"),
        rounds=2, steps=5, round_prompts=4, count=3, options=options(tmp_path),
    )  # fmt: skip
    run_rounds(job, StandIn())
    assert content(rounds) == content(job.output)
