"""nemo-run starts the same stages: on this machine, and through a real SLURM."""

import subprocess
import sys

import pytest
from cluster import Cluster
from launcher import ROOT

pytestmark = pytest.mark.slurm
pytest.importorskip("nemo_run", reason="nemo-run is not installed")


def launch(run, *words: str, environment: dict[str, str], **more: str) -> str:
    """Run tools/launch.py with a nemo-run home of its own; what it printed."""
    done = subprocess.run(
        [sys.executable, "tools/launch.py", *words, f"run={run.folder}"],
        cwd=ROOT, capture_output=True, text=True, timeout=400,
        env=environment | run.environment | {"NEMORUN_HOME": str(run.folder / "nemo")} | more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_slurm(cluster: Cluster, run_folder):
    """Convert as one task, then train on two nodes."""
    slurm = ["--executor", "slurm", "slurm.account=tests", "slurm.gpus=0"]
    slurm += [f"slurm.setup=source {sys.prefix}/bin/activate"]
    environment = cluster.environment
    launch(
        run_folder,
        "convert",
        *slurm,
        f"hf={run_folder.pivot}",
        "dtype=fp32",
        environment=environment,
    )
    assert (run_folder.folder / "pivot" / "latest_checkpointed_iteration.txt").exists()
    launch(
        run_folder,
        "prepare",
        *slurm,
        f"hf={run_folder.pivot}",
        "split=sft",
        environment=environment,
    )
    options = ["--nodes", "2", "--ranks", "1", "tensor=1", "pipeline=2", "bf16=false", "epochs=1"]
    options += ["lr=1e-3", "global_batch_size=4", "micro_batch_tokens=1024", "seq_length=512"]
    launch(run_folder, "sft", *slurm, *options, environment=environment)
    assert (run_folder.folder / "sft" / "latest_checkpointed_iteration.txt").read_text() == "3"


def test_local(cluster, run_folder):
    """One process, and two ranks under torchrun."""
    local = ["--executor", "local"]
    environment = cluster.environment
    for half in ("sft", "preference"):
        words = ["prepare", *local, f"hf={run_folder.pivot}", f"split={half}"]
        launch(run_folder, *words, environment=environment)
    launch(
        run_folder,
        "score",
        *local,
        "--ranks",
        "2",
        "index=1",
        "tensor=2",
        "bf16=false",
        environment=environment,
    )
    assert (run_folder.folder / "logprobs" / "qwen.json").exists()


def test_dry_run(cluster, run_folder):
    """The whole pipeline, with its order, nothing started."""
    slurm = ["--executor", "slurm", "slurm.account=tests", "--nodes", "2", "--dry-run"]
    printed = launch(run_folder, "pipeline", *slurm, environment=cluster.environment)
    for stage in (
        "convert",
        "prepare-sft",
        "sft",
        "score-initial",
        "score-qwen",
        "infifpo",
        "export",
    ):
        assert stage in printed
    assert not (run_folder.folder / "pivot").exists()
