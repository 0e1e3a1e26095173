"""The sbatch scripts on a real SLURM: a whole run, preemption, a lost node, a dead array task."""

import re

import pytest
from safetensors.torch import load_file

from support.launcher import ROOT
from support.slurm_cluster import NODES, Cluster, kill, wait_until

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


OPTIONS = "initial=pivot epochs=24 save_interval=40"


@pytest.fixture(scope="module")
def trained(cluster, shared_run):
    """A run whose pairs are scored under the pivot itself, and the losses of 120 steps on them."""
    convert = submit(cluster, shared_run, "convert.sbatch", "--nodes=1")
    assert cluster.wait(convert) == "COMPLETED", logs(shared_run)
    (shared_run.folder / "sources.yaml").write_text("initial: logprobs/initial\n")
    options = shared_run.environment["SCORE"] + " initial=pivot"
    score = submit(cluster, shared_run, ARRAY, "--nodes=1", SCORE=options)
    assert cluster.wait(score) == "COMPLETED", logs(shared_run)
    job = train(cluster, shared_run)
    assert cluster.wait(job) == "COMPLETED", logs(shared_run)
    assert cluster.job(job)["Restarts"] == "0"
    (shared_run.folder / "dpo").rename(shared_run.folder / "dpo-alone")
    return shared_run, shared_run.losses(job)


def train(cluster: Cluster, run) -> str:
    """Submit 120 steps on two nodes."""
    options = f"{run.environment['TRAIN']} {OPTIONS}"
    return submit(cluster, run, "train.sbatch", METHOD="dpo", TRAIN=options)


def preempt(cluster: Cluster, job: str) -> None:
    """Send what comes before a time limit."""
    cluster.run("scancel", "--batch", "--signal=USR1", job)


def cut_power(cluster: Cluster, job: str) -> None:
    """Lose a node, and get it back when SLURM has noticed."""
    cluster.kill_node(NODES[1])
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", 60, "a restart")
    cluster.start_node(NODES[1])


@pytest.mark.parametrize(("event", "lost"), [(preempt, 0), (cut_power, 40)])
def test_goes_on(cluster, trained, event, lost):
    """Stopped in the middle, training ends with the same losses as when it is left alone."""
    run, alone = trained
    job = train(cluster, run)
    wait_until(lambda: len(run.losses(job)) > 50, 120, "50 steps")
    event(cluster, job)
    assert cluster.wait(job) == "COMPLETED", logs(run)
    assert cluster.job(job)["Restarts"] == "1"
    (run.folder / "dpo").rename(run.folder / f"dpo-{event.__name__}")
    losses = run.losses(job)
    same = losses.keys() & alone.keys()
    assert len(same) >= 118 and 120 in same
    assert {step: losses[step] for step in same} == {step: alone[step] for step in same}
    first, second = sorted((run.folder / "logs").glob(f"*-{job}-[0-9].log"))
    stopped = max(map(int, re.findall(r" iteration +(\d+)/", first.read_text())))
    started = min(map(int, re.findall(r" iteration +(\d+)/", second.read_text())))
    assert stopped - started < max(1, lost)


def test_array_task_dies(cluster, run_folder):
    """Its log says so, the other task goes on, and submitted again it writes the same bytes."""
    folder = run_folder.folder / "logprobs"
    job = submit(cluster, run_folder, ARRAY, "--nodes=1", "--array=1-2")
    assert {cluster.wait(f"{job}_{i}") for i in (1, 2)} == {"COMPLETED"}, logs(run_folder)
    expected = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    assert {"qwen.json", "phi.json"} <= expected.keys()
    for name in expected:
        (folder / name).unlink()
    job = submit(cluster, run_folder, ARRAY, "--nodes=1", "--array=1-2", RETRIES="0")

    def ranks() -> list[int]:
        return cluster.processes(SLURM_ARRAY_JOB_ID=job, SLURM_ARRAY_TASK_ID="1", SLURM_PROCID="0")

    wait_until(ranks, 60, "a rank of the first task")
    kill(*ranks())
    assert cluster.wait(f"{job}_1") == "FAILED", logs(run_folder)
    assert cluster.wait(f"{job}_2") == "COMPLETED", logs(run_folder)
    assert not (folder / "qwen.json").exists()
    again = submit(cluster, run_folder, ARRAY, "--nodes=1", "--array=1")
    assert cluster.wait(f"{again}_1") == "COMPLETED", logs(run_folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == expected
