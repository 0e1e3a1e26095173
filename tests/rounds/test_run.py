"""The driver: what is done is skipped, and rounds killed anywhere end as uninterrupted ones."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.ends import StageError, StoppedError
from megatron_infifpo.rounds import run
from megatron_infifpo.rounds.run import run_rounds
from support.round_stages import Killed, StandIn, content

FIRST = ["import"]
ROUND = ["sample", "label", "prepare", "score", "score", "score", "train", "export"]


@pytest.mark.parametrize("optimizer", ["carry", "fresh"])
def test_rounds(make_job, optimizer):
    job, start = make_job(optimizer=optimizer), StandIn()
    run_rounds(job, start)
    assert start.ran == FIRST + 3 * ROUND
    table = [json.loads(line) for line in (job.output / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in table] == [0, 1, 2]
    assert {(row["prompts"], row["responses"], row["cut"]) for row in table} == {(4, 12, 4)}
    # Scores of prompt k are k, k + 1, k + 2.
    assert [row["reward"] for row in table] == [2.5] * 3
    lines = (job.output / "rounds.jsonl").read_bytes()
    (job.output / "rounds.jsonl").unlink()
    again = StandIn()
    run_rounds(job, again)
    assert again.ran == [] and (job.output / "rounds.jsonl").read_bytes() == lines
    run_rounds(make_job(optimizer=optimizer, rounds=4), again)
    assert again.ran == ROUND


@pytest.mark.parametrize("optimizer", ["carry", "fresh"])
@pytest.mark.parametrize("late", [False, True])
def test_killed_anywhere(make_job, optimizer, late):
    """Before a command has done anything, and after it did all but this program did not hear."""
    alone = StandIn()
    run_rounds(make_job(output=Path("alone"), rounds=2, optimizer=optimizer), alone)
    expected = content(Path("alone"))
    for die_at in range(len(alone.ran)):
        job = make_job(output=Path(f"killed-{die_at}"), rounds=2, optimizer=optimizer)
        first, second = StandIn(die_at, late=late), StandIn()
        with pytest.raises(Killed):
            run_rounds(job, first)
        run_rounds(job, second)
        assert content(job.output) == expected, die_at
        assert first.ran[: die_at + late] + second.ran == alone.ran
        shutil.rmtree(job.output)


def test_killed_again_and_again(make_job):
    run_rounds(make_job(output=Path("alone")), StandIn())
    job = make_job()
    for turn in range(60):
        try:
            run_rounds(job, StandIn(turn % 2, late=turn % 2 == 0))
            break
        except Killed:
            continue
    else:
        pytest.fail("no progress")
    assert content(job.output) == content(Path("alone"))


def test_until(make_job):
    start = StandIn()
    run_rounds(make_job(until=0), start)
    assert start.ran.count("train") == 1
    run_rounds(make_job(until=1), start)
    run_rounds(make_job(until=1), start)
    assert start.ran.count("train") == 2
    run_rounds(make_job(), start)
    whole = make_job(output=Path("alone"))
    run_rounds(whole, StandIn())
    assert content(Path("out")) == content(whole.output)


def test_a_table_that_goes_on(make_job, capsys):
    run_rounds(make_job(rounds=2), StandIn())
    *last, where = capsys.readouterr().out.splitlines()[-4:]
    assert where == "the policy is in out/round-001/hf"
    assert last[0].split()[:5] == ["round", "prompts", "records", "cut", "reward"]
    assert [line.split()[:2] for line in last[1:]] == [["0", "4"], ["1", "4"]]
    assert "33%" in last[1]
    run_rounds(make_job(rounds=2), StandIn())
    assert capsys.readouterr().out.splitlines() == ["nothing left to do", *last, where]


def test_what_is_made_of_something_else(make_job):
    """What a user deletes is made again, and nothing that came of the old one is mixed with it."""
    job = make_job()
    run_rounds(job, StandIn())
    (job.output / "round-002" / "round.json").unlink()
    (job.output / "round-002" / "responses.jsonl").unlink()
    with pytest.raises(UserError, match="label: .*records.jsonl is there, but of another run of"):
        run_rounds(job, StandIn())
    shutil.rmtree(job.output / "round-002")
    with pytest.raises(UserError, match="train: .* put back an older copy of the run's checkpoint"):
        run_rounds(job, StandIn())
    fresh = make_job(output=Path("fresh"), optimizer="fresh")
    run_rounds(fresh, StandIn())
    expected = content(fresh.output)
    shutil.rmtree(fresh.output / "round-001")
    with pytest.raises(UserError, match="round-002 was sampled from another model"):
        run_rounds(fresh, StandIn())
    shutil.rmtree(fresh.output / "round-002")
    again = StandIn()
    run_rounds(fresh, again)
    assert again.ran.count("export") == 1 and content(fresh.output) == expected


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": 4}, "its count is 3, this one's is 4"),
        ({"options": {"label": "--program judge.py:other"}}, "its judge is"),
        ({"options": {"label": "--program judge.py:score --cut-penalty 1"}}, "its label is"),
        ({"rounds": 2}, "--rounds is 2, but out is to have 3"),
    ],
)
def test_changed_settings(make_job, changed, message):
    run_rounds(make_job(until=0), StandIn())
    with pytest.raises(UserError, match=message):
        run_rounds(make_job(**changed), StandIn())
    if "rounds" not in changed:
        start = StandIn()
        run_rounds(make_job(**changed, allow_changed_settings=True, until=0), start)
        assert start.ran == [], "what is done stays"
        run_rounds(make_job(**changed, until=0), start)


@pytest.mark.parametrize(
    ("optimizer", "changed", "message"),
    [
        ("carry", {"steps": 6}, "out has --steps 5, this is 6: one training run goes through all"),
        ("carry", {"optimizer": "fresh"}, "out has --optimizer carry, this is fresh: its rounds"),
        ("fresh", {"optimizer": "carry"}, "out has --optimizer fresh, this is carry: its rounds"),
    ],
)
@pytest.mark.parametrize("allowed", [False, True])
def test_what_a_run_cannot_become(make_job, optimizer, changed, message, allowed):
    """It would do something else than is asked for: no flag allows it."""
    run_rounds(make_job(until=0, optimizer=optimizer), StandIn())
    given = {"optimizer": optimizer, **changed, "allow_changed_settings": allowed}
    with pytest.raises(UserError, match=message):
        run_rounds(make_job(**given), StandIn())


def test_other_steps_of_a_fresh_optimizer(make_job):
    run_rounds(make_job(until=0, optimizer="fresh"), StandIn())
    more = {"steps": 6, "until": 1, "optimizer": "fresh"}
    with pytest.raises(UserError, match="its steps is 5, this one's is 6"):
        run_rounds(make_job(**more), StandIn())
    run_rounds(make_job(**more, allow_changed_settings=True), StandIn())
    assert Path("out/round-001/checkpoint/iter_0000006").exists()


def test_changed_files(make_job):
    run_rounds(make_job(until=0), StandIn())
    pool = Path("prompts.jsonl").read_text()
    Path("prompts.jsonl").write_text(pool.replace("say 9", "say nine"))
    with pytest.raises(UserError, match="its prompts_sha256 is"):
        run_rounds(make_job(), StandIn())
    Path("prompts.jsonl").write_text(pool)
    sources = Path("sources.yaml").read_text()
    Path("sources.yaml").write_text(sources.replace("0.3", "0.4"))
    with pytest.raises(UserError, match="its sources is"):
        run_rounds(make_job(), StandIn())
    Path("sources.yaml").write_text(sources)
    judge = Path("judge.py").read_text()
    Path("judge.py").write_text(judge.replace("0.0", "1.0"))
    with pytest.raises(UserError, match="its judge is 'judge.py:score "):
        run_rounds(make_job(), StandIn())
    Path("judge.py").write_text(judge)
    run_rounds(make_job(launcher="torchrun", keep_rounds=1), StandIn())


@pytest.mark.parametrize("optimizer", ["carry", "fresh"])
def test_keep_rounds(make_job, optimizer):
    """Old weights go, and what goes on has all that it needs."""
    run_rounds(make_job(output=Path("all"), optimizer=optimizer), StandIn())
    job = make_job(keep_rounds=1, optimizer=optimizer)
    for until in range(3):
        run_rounds(make_job(keep_rounds=1, optimizer=optimizer, until=until), StandIn())
    kept, everything = content(job.output), content(Path("all"))
    gone = everything.keys() - kept.keys()
    assert kept.items() <= everything.items()
    checkpoint = "checkpoint/iter_{:07d}" if optimizer == "carry" else "round-{:03d}/checkpoint"
    numbers = (5, 10) if optimizer == "carry" else (0, 1)
    for name in (*(checkpoint.format(n) for n in numbers), "round-000/hf", "round-001/hf"):
        assert any(path.startswith(name) for path in gone), name
    assert all("checkpoint/iter_" in path or "/hf/" in path for path in gone)
    start = StandIn()
    run_rounds(make_job(keep_rounds=1, optimizer=optimizer, rounds=4), start)
    assert start.ran.count("train") == 1


@pytest.mark.parametrize(("code", "error"), [(2, UserError), (1, StageError), (-9, StageError)])
def test_a_stage_that_fails(make_job, capsys, code, error):
    class Fails(StandIn):
        def __call__(self, words, log):
            if "label" not in words:
                return super().__call__(words, log)
            log.write_text("first\nthe judge is not there\n")
            return code

    with pytest.raises(error, match=f"round-000: the stage label ended with {code}, see "):
        run_rounds(make_job(), Fails())
    assert "the judge is not there" in capsys.readouterr().err
    run_rounds(make_job(), StandIn())


def test_a_training_that_was_stopped(make_job):
    """It saves, ends with 0, and is not done."""

    class Stops(StandIn):
        def train(self, given):
            super().train(given | {"stop-at": "3"})

    with pytest.raises(StageError, match="the stage train stopped at step 3 of 5"):
        run_rounds(make_job(), Stops())
    run_rounds(make_job(), StandIn())


@pytest.mark.parametrize(
    ("name", "said", "code"),
    [("SIGTERM", "stopped", 1), ("SIGHUP", "stopped", 1), ("SIGINT", "interrupted", 130)],
)
def test_terminated(make_job, monkeypatch, capsys, name, said, code):
    """A signal goes to the stage as SIGTERM, nothing starts after it, and no log is shown."""
    child = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); "
        "assert os.getpgrp() != os.getpgid(os.getppid()); "
        f"print('saving'); os.kill(os.getppid(), signal.{name}); signal.pause()"
    )
    monkeypatch.setattr(run, "command", lambda job, stage: [sys.executable, "-c", child])
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)  # nohup, or a background job, ignores some
    try:
        with pytest.raises(StoppedError, match=f"^{said} in import; the same command") as stopped:
            run_rounds(make_job())
    finally:
        signal.signal(number, before)
    assert stopped.value.code == code and "saving" not in capsys.readouterr().err


def test_environment_of_a_stage(make_job, monkeypatch):
    """It is the one that is given: what the driver's own imports set is not in it."""
    child = "import os; print(sorted(os.environ))"
    monkeypatch.setattr(run, "command", lambda job, stage: [sys.executable, "-c", child])
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(StageError, match="ended without out/pivot"):
        run_rounds(make_job(), environment={"PATH": "", "HERE": "1"})
    printed = Path("out/logs/import.log").read_text()
    assert "'HERE'" in printed and "TORCHDYNAMO_DISABLE" not in printed


def test_ends_after_a_stage(make_job, monkeypatch):
    """SIGUSR1 leaves the stage alone, and nothing starts after it."""
    job, child = make_job(), "import os, signal; os.kill(os.getppid(), signal.SIGUSR1)"
    child += "; import pathlib; p = pathlib.Path('out/pivot'); p.mkdir(); "
    child += "(p / 'latest_checkpointed_iteration.txt').touch()"
    monkeypatch.setattr(run, "command", lambda job, stage: [sys.executable, "-c", child])
    with pytest.raises(StoppedError, match="stopped in round 0, sample; the same command goes on"):
        run_rounds(job)


def test_two_at_once(make_job):
    """Rounds in one folder have one driver."""
    job = make_job()
    job.output.mkdir()
    hold = (
        "import sys; from megatron_infifpo.training.lock import RunLock; l = RunLock('out'); "
        "l.take(); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="--output out is in use by process"):
            run_rounds(job, StandIn())
    finally:
        other.communicate()
    run_rounds(job, StandIn())


def test_prompts_that_are_malformed(make_job, capsys):
    """They stop rounds, or are left out, named, in every stage that reads them."""
    file = Path("prompts.jsonl")
    file.write_text(file.read_text() + '{"id": "p99", "prompt": "", "hint": 1}\n')
    with pytest.raises(UserError, match="prompts.jsonl:11: .*expected"):
        run_rounds(make_job(), StandIn())
    run_rounds(make_job(on_bad_record="skip", rounds=1), StandIn())
    assert "skipped 1 bad records:\n  prompts.jsonl:11: " in capsys.readouterr().err
    with pytest.raises(UserError, match="--on-bad-record is 'leave', expected one of error, skip"):
        make_job(on_bad_record="leave")


def test_prompts_that_are_not_there(make_job):
    with pytest.raises(UserError, match="--round-prompts is 11, but prompts.jsonl has 10"):
        run_rounds(make_job(round_prompts=11), StandIn())
    sources = Path("sources.yaml")
    sources.write_text(sources.read_text().replace("[code]", "[code, law]"))
    with pytest.raises(UserError, match="'two' names the domain 'law', expected .*: code, general"):
        run_rounds(make_job(), StandIn())
