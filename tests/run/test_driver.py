"""Stages as processes: skipped where they are done, refused where they are others, resumed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.ends import StageError
from megatron_infifpo.recipes.job import Job
from megatron_infifpo.run import driver
from megatron_infifpo.run.board import table
from megatron_infifpo.run.driver import redo, run_here, run_stages
from megatron_infifpo.run.names import Names
from megatron_infifpo.run.reading import read_run
from megatron_infifpo.run.stage import Stage
from megatron_infifpo.run.stamps import know, progress, put_away
from megatron_infifpo.run.status import status
from support.launcher import ROOT

# Appends its name to a file and writes what it makes, of what it reads.
WORKER = """
import pathlib, sys, time
name, made, *read = sys.argv[1:sys.argv.index('--') if '--' in sys.argv else None]
with open('ran', 'a') as file:
    file.write(name + '\\n')
if pathlib.Path(name + '.waits').exists():
    time.sleep(60)
if pathlib.Path(name + '.fails').exists():
    print('error: ' + name + ' cannot')
    sys.exit(int(pathlib.Path(name + '.fails').read_text()))
path = pathlib.Path(made)
path.parent.mkdir(parents=True, exist_ok=True)
path.write_text(name + ''.join(pathlib.Path(each).read_text() for each in read))
"""


def stage(name: str, *after: str, inputs=(), more=()) -> Stage:
    out = Path("out")
    words = (str(out / name / "made"), *(str(out / each / "made") for each in after), *inputs)
    job = Job(name, (name, *words, *more))
    return Stage(job, after, out / name / "made", tuple(inputs), (out / name,))


def chain(**more) -> list[Stage]:
    first = stage("first", inputs=("pairs.jsonl",))
    return [
        first,
        stage("left", "first", **more),
        stage("right", "first"),
        stage("last", "left", "right"),
    ]


@pytest.fixture
def run(folder, monkeypatch):
    """Stages run WORKER in place of a command."""
    (folder / "worker.py").write_text(WORKER)
    monkeypatch.setattr(Job, "python_words", property(lambda job: ("worker.py", *job.arguments)))
    return read_run("run.yaml")


def ran() -> list[str]:
    path = Path("ran")
    return path.read_text().split() if path.exists() else []


def test_each_once_in_order(run):
    run_stages(run, chain())
    assert ran()[0] == "first" and ran()[-1] == "last" and sorted(ran()[1:3]) == ["left", "right"]
    assert Path("out/last/made").read_text() == "lastleftfirst{}\nrightfirst{}\n"
    run_stages(run, chain())
    assert len(ran()) == 4  # all are skipped
    assert [line.split()[1] for line in status(run, chain())[1:]] == ["done"] * 4


def test_a_lost_output_is_made_again(run):
    run_stages(run, chain())
    Path("out/left/made").unlink()
    run_stages(run, chain())
    assert ran()[4:] == ["left"]


@pytest.mark.parametrize("change", ["input", "words"])
def test_what_changed_is_refused_until_it_is_redone(run, change, capfd):
    run_stages(run, chain())
    stages = chain()
    if change == "input":
        Path("pairs.jsonl").write_text("other")
        said = "first in out was made of something else: pairs.jsonl is another one, or was changed"
    else:
        stages = chain(more=("--", "--lr", "2"))
        said = "left in out was made of something else: its command had nothing, and has -- --lr 2"
    with pytest.raises(UserError, match=said):
        run_stages(run, stages)
    assert len(ran()) == 4 and any("was made of something else" in x for x in status(run, stages))
    first = "first" if change == "input" else "left"
    again = redo(run, stages, [first])
    assert again == (["first", "left", "right", "last"] if change == "input" else ["left", "last"])
    assert Path(f"out/old/001/{first}/made").exists() and not Path(f"out/{first}/made").exists()
    run_stages(run, stages)
    assert ran()[4:] == again or sorted(ran()[4:]) == sorted(again)


def test_moved_files_and_other_ranks_are_the_same_run(run):
    run_stages(run, chain(more=("--", "--tensor-model-parallel-size", "1")))
    Path("elsewhere").mkdir()
    Path("pairs.jsonl").rename("elsewhere/pairs.jsonl")
    first = stage("first", inputs=("elsewhere/pairs.jsonl",))
    run_stages(run, [first, *chain(more=("--", "--tensor-model-parallel-size", "4"))[1:]])
    assert len(ran()) == 4


def test_a_failure(run, capfd):
    """Stages beside it end, none begins; for exit code 2 a person must mend something."""
    Path("left.fails").write_text("2")
    with pytest.raises(UserError, match="the stage left ended with 2, see out/stages/left/log"):
        run_stages(run, chain())
    assert "error: left cannot" in capfd.readouterr().err
    assert "last" not in ran()
    Path("left.fails").write_text("1")
    with pytest.raises(StageError, match="left ended with 1.*the same command goes on"):
        run_stages(run, chain())
    Path("left.fails").unlink()
    run_stages(run, chain())
    assert ran().count("first") == 1 and ran().count("last") == 1


def test_what_has_left_nothing_is_begun_anew(run, capfd):
    """A stage that failed at once, for its words: no --redo is needed once they are mended."""
    Path("left.fails").write_text("2")
    with pytest.raises(UserError, match="left ended with 2"):
        run_stages(run, chain())
    Path("left.fails").unlink()
    run_stages(run, chain(more=("--", "--lr", "2")))
    assert ran().count("first") == 1 and ran().count("last") == 1


def test_ended_without_what_it_makes(run):
    with pytest.raises(StageError, match="ended without out/first/none"):
        made = Path("out/first/none")
        run_stages(run, [Stage(stage("first").job, (), made, (), ())])


def test_only_one(run):
    with pytest.raises(UserError, match="left waits for first, which is not done"):
        run_stages(run, chain(), only="left")
    run_stages(run, chain(), only="first")
    assert ran() == ["first"]
    with pytest.raises(UserError, match="there is no stage 'lost', expected one of first, left"):
        run_stages(run, chain(), only="lost")


def test_as_one_of_its_ranks(run):
    run_here(run, chain(), "first", 0)
    run_here(run, chain(), "first", 1)  # comes late: it is done
    assert ran() == ["first"]
    run_here(run, chain(), "left", 1)
    run_here(run, chain(), "left", 0)
    assert ran() == ["first", "left", "left"]


def test_one_driver_at_a_time(run):
    run_stages(run, chain(), only="first")
    code = (
        "import fcntl, time; file = open('out/.run.lock', 'a+'); "
        "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="output out is in use by"):
            run_stages(run, chain())
    finally:
        holder.kill()
        holder.wait()


DRIVE = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from megatron_infifpo.recipes.job import Job
from megatron_infifpo.run import layouts
from megatron_infifpo.run.driver import run_stages
from megatron_infifpo.run.reading import read_run
from tests.run.test_driver import chain
layouts.count_gpus = lambda: 0
Job.python_words = property(lambda job: ("worker.py", *job.arguments))
run_stages(read_run("run.yaml"), chain())
"""


def drive() -> subprocess.Popen:
    code = DRIVE.format(root=str(ROOT), tests=str(ROOT / "tests"))
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], stderr=subprocess.PIPE)


def wait_for(name: str) -> None:
    for _ in range(600):
        if name in ran():
            return
        time.sleep(0.1)
    raise AssertionError(f"{name} never ran")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_in_a_stage(run, how):
    """Whatever ends the driver, the same command goes on, and ends with the same."""
    Path("right.waits").touch()
    process = drive()
    wait_for("right")
    process.send_signal(how)
    code = process.wait(20)
    assert code == -how if how == signal.SIGKILL else code == 1
    for pid in _workers():
        os.kill(pid, signal.SIGKILL)
    Path("right.waits").unlink()
    before = ran()
    run_stages(run, chain())
    assert ran()[len(before) :].count("first") == 0
    assert Path("out/last/made").read_text() == "lastleftfirst{}\nrightfirst{}\n"


def _workers() -> list[int]:
    here = os.getcwd()
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            words = (each / "cmdline").read_bytes().split(b"\0")
            if b"worker.py" in words and os.readlink(each / "cwd") == here:
                found.append(int(each.name))
        except OSError:
            continue
    return found


def test_names_that_begin_alike_are_kept(folder):
    """The files of qwen2.5 are none of qwen2."""
    logprobs = Path("out/logprobs")
    logprobs.mkdir(parents=True)
    for name in ("qwen2.json", "qwen2_sums.npy", "qwen2.5.json", "qwen2.5_sums.npy"):
        (logprobs / name).touch()
    both = [
        Stage(Job(name, ()), (), logprobs / f"{name}.json", (), (logprobs / name,))
        for name in ("qwen2", "qwen2.5")
    ]
    put_away(Names(Path("out")), both[:1], both[1:])
    assert sorted(path.name for path in logprobs.iterdir()) == ["qwen2.5.json", "qwen2.5_sums.npy"]
    put_away(Names(Path("out")), both[1:], both[:1])
    assert not list(logprobs.iterdir())


def test_progress(tmp_path):
    log = tmp_path / "log"
    assert progress(log) is None
    log.write_text("$ old\n iteration       90/     100 | loss\n$ new\nscore:  37%|###  | 3/8")
    assert progress(log) == 0.37
    log.write_text("$ new\n [2026] iteration        5/      20 | consumed samples: 3 | loss: 1")
    assert progress(log) == 0.25


def test_table():
    rows = [
        ("a", "done", None, 3725.0),
        ("longer", "running", 0.25, 187.0),
        ("b", "waits", None, None),
    ]
    assert table(rows) == [
        "stage   state     progress      time",
        "a       done                 1:02:05",
        "longer  running        25% 3:07 left",
        "b       waits",
    ]


def test_a_training_that_was_stopped(run, monkeypatch):
    """It saves at a signal, and ends with 0: that is not its end."""
    monkeypatch.setattr(driver, "steps_of", lambda save: 20)
    one = stage("first")
    training = Stage(one.job, (), one.made, (), one.outputs, trains=True)
    with pytest.raises(StageError, match="stopped at step first of 20"):
        run_stages(run, [training])
    assert not know([training], Names(Path("out")))["first"].done
