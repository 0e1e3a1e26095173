"""Folders that a run reads and writes: each is one thing, and is written by one run."""

import os
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.lock import RunLock
from megatron_infifpo.training.start import find_start


@pytest.fixture
def folders(setup, tmp_path, monkeypatch) -> Path:
    """`pivot` is converted, `run` a run, `empty` an empty folder; the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pivot").symlink_to(setup.pivot)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "empty").mkdir()
    return tmp_path


def start(**given):
    names = dict.fromkeys(("save", "load", "pretrained_checkpoint"))
    return find_start(Folders.read(names | {"finetune": False} | given))


@pytest.mark.parametrize(
    "given, expected",
    [
        ("save=pivot pretrained_checkpoint=pivot", "--save and --pretrained-checkpoint are both"),
        ("save=run pretrained_checkpoint=./run/", "--save and --pretrained-checkpoint are both"),
        ("load=run pretrained_checkpoint=run", "--load and --pretrained-checkpoint are both"),
        ("save=pivot", "--save pivot is a converted pivot"),
        ("load=nowhere pretrained_checkpoint=pivot", "--load nowhere has no checkpoint"),
        ("load=empty save=run pretrained_checkpoint=pivot", "--load empty has no checkpoint"),
        ("load=pivot save=run", "--save run holds a run already"),
        ("save=run finetune=1", "--finetune would start a new run in --save run"),
        ("save=run/latest_checkpointed_iteration.txt/x", "cannot be made or .* is a file"),
        ("save=empty", "no checkpoint in empty"),
        ("save=run", "run has no iter_0000003: its iterations are none"),
    ],
)
def test_refused(folders, given, expected):
    with pytest.raises(UserError, match=expected):
        start(**dict(pair.split("=") for pair in given.split()))


@pytest.mark.parametrize(
    "given",
    [
        "save=empty pretrained_checkpoint=pivot",
        "save=empty load=empty pretrained_checkpoint=pivot",
        "save=new pretrained_checkpoint=pivot",
        "pretrained_checkpoint=pivot",
        "load=pivot save=new",
    ],
)
def test_a_new_run(folders, given):
    found = start(**dict(pair.split("=") for pair in given.split()))
    assert (found.folder, found.resumed, found.step, found.samples) == (Path("pivot"), False, 0, 0)
    assert not Path("new").exists()


def test_a_lock_goes_with_its_process(tmp_path):
    """Another process is kept out, until the one that holds it has ended, however."""
    RunLock(tmp_path).try_early()
    assert not any(tmp_path.iterdir()), "a folder that nothing was run in is left alone"
    ready, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        held = RunLock(tmp_path)
        held.take()
        os.write(ready[1], b".")
        os.read(go_on[0], 1)
        os._exit(9)
    os.read(ready[0], 1)
    try:
        with pytest.raises(UserError, match=rf"is in use by process {child} on \S+ since 20"):
            RunLock(tmp_path).try_early()
    finally:
        os.write(go_on[1], b".")
        os.waitpid(child, 0)
    mine = RunLock(tmp_path)
    mine.try_early()
    mine.take()
    assert f"process {os.getpid()} on" in mine.path.read_text()
