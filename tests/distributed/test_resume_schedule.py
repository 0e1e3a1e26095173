"""Resuming with another learning rate or schedule: it works, or a sentence says what does."""

import shutil

import pytest
from launcher import RankError
from test_training import BOTH, steps_of

PROGRAM = ("megatron_infifpo.train",)
SIX = ["--save-interval", "3", "--train-iters", "6"]


@pytest.fixture(scope="module")
def half(setup, ranks, tmp_path_factory):
    """A run that ended after three of six steps; `copy(flags)` resumes a copy of it."""
    folder = tmp_path_factory.mktemp("half")
    flags = setup.flags(setup.sources("both", *BOTH), *SIX)
    ranks(1, "workers:train", [*flags, "--save", str(folder / "run"), "--exit-interval", "3"])

    def resume(copy, *more, program=(), start=folder / "run"):
        shutil.copytree(start, copy)
        target = "workers:command" if program else "workers:train"
        return ranks(1, target, *program, [*flags, "--save", str(copy), *more])

    return resume


@pytest.mark.parametrize(
    "more, said",
    [
        (["--lr", "2e-3"], "lr was 0.001 and is 0.002: .*--no-load-optim"),
        (["--train-iters", "9"], "train iters was 6 and is 9, .*--override-opt_param-scheduler"),
        (["--no-save-optim"], "--no-save-optim does not go with a resumed optimizer"),
    ],
)
def test_refused_in_a_sentence(half, tmp_path, more, said):
    with pytest.raises(RankError, match=said) as failure:
        half(tmp_path / "run", *more, program=PROGRAM)
    assert failure.value.codes == [2] and "Traceback" not in failure.value.logs[0]


@pytest.mark.parametrize("flag", ["--override", "--use-checkpoint"])
def test_more_steps(half, tmp_path, flag):
    """The rate is constant, so both schedules go on as the undisturbed run, and longer."""
    longer = steps_of(
        half(tmp_path / "longer", "--train-iters", "9", f"{flag}-opt_param-scheduler")
    )
    usual = steps_of(half(tmp_path / "usual"))
    assert len(usual) == 3 and len(longer) == 6
    assert [s["loss"] for s in longer[:3]] == [s["loss"] for s in usual]


def test_another_rate_with_a_fresh_optimizer(half, tmp_path):
    fresh = ["--no-load-optim", "--override-opt_param-scheduler", "--lr", "2e-3"]
    steps = steps_of(half(tmp_path / "run", *fresh))
    assert len(steps) == 3


def test_no_state_was_saved(half, tmp_path):
    """A run without optimizer state resumes only if told to."""
    half(tmp_path / "run", "--no-save-optim", "--no-load-optim")
    longer = ["--train-iters", "9"]
    with pytest.raises(RankError, match="has no optimizer state: pass --no-load-optim"):
        half(tmp_path / "copy", *longer, program=PROGRAM, start=tmp_path / "run")
