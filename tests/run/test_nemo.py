"""A run through nemo-run: a task a stage, after those it waits for; what is done is left out."""

from pathlib import Path

import pytest

from megatron_infifpo.run.reading import read_run
from megatron_infifpo.run.stamps import begin, finish, know
from megatron_infifpo.run.start import plan

nemo_run = pytest.importorskip("nemo_run", reason="nemo-run is not installed")


def test_experiment(folder, monkeypatch, tmp_path):
    from megatron_infifpo.recipes.executors import local
    from megatron_infifpo.run.names import Names
    from megatron_infifpo.run.nemo import fuse_experiment

    monkeypatch.setenv("NEMORUN_HOME", str(tmp_path / "nemo"))
    run = read_run("run.yaml")
    names = Names(Path("out"))
    known = know(plan(run), names)
    split = known["split"]
    for path in split.stage.outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    begin(names, split)
    finish(names, split, 1.0)
    experiment = fuse_experiment("run.yaml", alone=local(1, 1), every_rank=local(1, 2))
    jobs = {job.id: job for job in experiment.jobs}
    assert "split" not in jobs and "infifpo" in jobs
    assert set(jobs["infifpo"].dependencies) == {
        "prepare-preference", "sft", "score-sft", "score-qwen2", "score-qwen2.5"
    }  # fmt: skip
    assert jobs["infifpo"].task.args[:4] == ["fuse", "out/run.yaml", "--only", "infifpo"]
    assert jobs["infifpo"].executor.ntasks_per_node == 2
    assert jobs["export-infifpo"].executor.ntasks_per_node == 1
    assert jobs["prepare-sft"].dependencies == []


def test_command_line():
    """`nemorun infifpo fuse` is an entry point of this package."""
    from importlib.metadata import entry_points

    from nemo_run.cli.api import list_entrypoints

    point = next(each for each in entry_points(group="nemo_run.cli") if each.name == "infifpo")
    assert point.load().fuse
    assert "fuse" in list_entrypoints()["infifpo"]
