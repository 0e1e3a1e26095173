"""nemo-run starts the same stages: a run through a real SLURM, and two ranks of this machine."""

import subprocess
import sys

import pytest
from safetensors.torch import load_file

from support.launcher import ROOT
from support.slurm_cluster import Cluster

pytestmark = pytest.mark.slurm
pytest.importorskip("nemo_run", reason="nemo-run is not installed")
SMALL = "bf16=false lr=1e-3 global_batch_size=4 micro_batch_tokens=1024 seq_length=512".split()


def launch(cluster: Cluster, run, *words: str, code: int = 0) -> str:
    """Run tools/launch.py, with a home of its own for nemo-run; what it printed."""
    environment = cluster.environment | {"NEMORUN_HOME": str(run.folder / "nemo")}
    done = subprocess.run(
        [sys.executable, "tools/launch.py", *words, f"run={run.folder}"],
        cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    printed = done.stdout + done.stderr
    assert done.returncode == code, printed[-6000:]
    return printed


@pytest.fixture(scope="module")
def trained(cluster, shared_run):
    """The whole experiment through SLURM, in the order of its dependencies, on two nodes."""
    words = ["pipeline", "--executor", "slurm", "--nodes", "2", "--ranks", "1", *SMALL]
    words += ["tensor=1", "pipeline=2", f"hf={shared_run.pivot}"]
    words += ["slurm.account=tests", f"slurm.setup=source {sys.prefix}/bin/activate"]
    return shared_run, launch(cluster, shared_run, *words)


def test_pipeline_through_slurm(trained):
    run, printed = trained
    model = run.folder / "infifpo-hf" / "model.safetensors"
    assert model.exists(), printed[-6000:]
    fused, pivot = load_file(model), load_file(run.pivot / "model.safetensors")
    assert fused.keys() == pivot.keys()
    assert any((fused[name] != pivot[name]).any() for name in pivot)


def test_local(cluster, trained):
    """Two ranks of this machine under torchrun, on the data of the other run; then one process."""
    run, _ = trained
    local = ("--executor", "local")
    options = ("--ranks", "2", *SMALL, "tensor=2", "pipeline=1", "method=dpo")
    printed = launch(cluster, run, "infifpo", *local, *options)
    tracker = run.folder / "dpo" / "latest_checkpointed_iteration.txt"
    assert tracker.exists() and tracker.read_text() == "5", printed[-6000:]
    printed = launch(cluster, run, "export", *local, "method=dpo")
    assert (run.folder / "dpo-hf" / "model.safetensors").exists(), printed[-6000:]


def test_a_failed_job_is_a_failure(cluster, trained):
    run, _ = trained
    printed = launch(cluster, run, "export", "--executor", "local", "method=nothing", code=1)
    assert "failed: export-nothing" in printed
