"""The sbatch scripts on a real SLURM: a whole run, and preemption in the middle of training."""

import re

import pytest
from cluster import Cluster, wait_until
from launcher import ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.slurm
SCRIPTS = ROOT / "examples" / "slurm"
ARRAY = "score_array.sbatch"


def submit(cluster: Cluster, run, script: str, *flags: str, **environment: str) -> str:
    """Submit one job script on two nodes; its id."""
    (run.folder / "logs").mkdir(exist_ok=True)
    size = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    log = f"--output={run.folder}/logs/%x-%j.out"
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", *size, log, *flags, SCRIPTS / script]
    return cluster.run(*command, **(run.environment | environment)).strip()


def logs(run) -> str:
    """Everything that jobs printed, for messages."""
    files = sorted((run.folder / "logs").glob("*"))
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)


def test_whole_run(cluster, run_folder, monkeypatch):
    """pipeline.sh, from Hugging Face and records to a fused model, on two nodes."""
    environment = {**run_folder.environment, "INFIFPO_ENV": str(SCRIPTS / "env.sh")}
    monkeypatch.chdir(ROOT)
    printed = cluster.run("bash", SCRIPTS / "pipeline.sh", **environment)
    last = printed.split("export ")[1].split()[0]
    assert cluster.wait(last, 400) == "COMPLETED", logs(run_folder)
    train = printed.split("train ")[1].split(",")[0]
    assert len(run_folder.losses(train)) == 4  # of five: one line is left out
    fused = load_file(run_folder.folder / "infifpo-hf" / "model.safetensors")
    pivot = load_file(run_folder.pivot / "model.safetensors")
    assert fused.keys() == pivot.keys()
    assert any((fused[name] != pivot[name]).any() for name in pivot)


@pytest.fixture
def prepared(cluster, run_folder):
    """A run whose pairs are scored under the pivot itself, ready for training."""
    environment = {**run_folder.environment, "METHOD": "dpo"}
    convert = submit(cluster, run_folder, "convert.sbatch", "--nodes=1")
    assert cluster.wait(convert) == "COMPLETED", logs(run_folder)
    environment["SCORE"] += " initial=pivot"
    (run_folder.folder / "sources.yaml").write_text("initial: logprobs/initial\n")
    script = SCRIPTS / ARRAY
    flags = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", f"--chdir={ROOT}"]
    log = f"--output={run_folder.folder}/logs/%x-%j.out"
    score = cluster.run("sbatch", "--parsable", *flags, log, script, **environment).strip()
    assert cluster.wait(score) == "COMPLETED", logs(run_folder)
    return run_folder


def test_preempted(cluster, prepared):
    """Stopped in the middle, a run ends with the same losses as one that was left alone."""
    options = prepared.environment["TRAIN"] + " initial=pivot epochs=60 save_interval=100"
    found = {}
    for name in ("alone", "preempted"):
        environment = {"METHOD": "dpo", "TRAIN": options}
        job = submit(cluster, prepared, "train.sbatch", **environment)
        if name != "alone":
            wait_until(lambda job=job: len(prepared.losses(job)) > 120, 120, "120 steps")
            cluster.run("scancel", "--batch", "--signal=USR1", job)
        assert cluster.wait(job) == "COMPLETED", logs(prepared)
        assert cluster.job(job)["Restarts"] == ("0" if name == "alone" else "1")
        found[name] = prepared.losses(job)
        (prepared.folder / "dpo").rename(prepared.folder / f"dpo-{name}")
    same = found["preempted"].keys() & found["alone"].keys()
    assert len(same) >= 298 and 300 in same
    assert {step: found["preempted"][step] for step in same} == {s: found["alone"][s] for s in same}
    log = "\n".join(path.read_text() for path in (prepared.folder / "logs").glob(f"*-{job}-*"))
    saved = re.findall(r"successfully saved checkpoint from iteration +(\d+)", log)
    assert any(120 < int(step) < 200 for step in saved), "nothing is lost at a signal"
