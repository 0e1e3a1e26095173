"""Going on with a run, otherwise: it works as one would expect, or a sentence says what does."""

import re
import shutil

import pytest

from megatron_infifpo.training.lock import RunLock
from support.launcher import RankError
from support.runs import BOTH

PROGRAM = ("megatron_infifpo.train",)
SIX = ["--save-interval", "3", "--train-iters", "6"]
OVERRIDE = "--override-opt-param-scheduler"


@pytest.fixture(scope="module")
def half(setup, ranks, tmp_path_factory):
    """A run that ended after three of six steps; `half(copy, flags)` resumes a copy of it.

    As a program in its own --save; else from --load, which saves nothing, and time.
    """
    folder = tmp_path_factory.mktemp("half")
    flags = setup.flags(setup.sources("both", *BOTH), *SIX)
    ranks(
        1,
        "support.training:train",
        [*flags, "--save", str(folder / "run"), "--exit-interval", "3"],
    )

    def resume(copy, *more, program=(), start=folder / "run"):
        if not copy.exists():
            shutil.copytree(start, copy)
        if program:
            return ranks(1, "support.tools:command", *program, [*flags, "--save", str(copy), *more])
        return ranks(1, "support.training:train", [*flags, "--load", str(copy), *more])

    return resume


@pytest.fixture(scope="module")
def usual(half, tmp_path_factory):
    """The last three steps, undisturbed."""
    return half(tmp_path_factory.mktemp("usual") / "run")[0]


@pytest.mark.parametrize(
    "more, said",
    [
        (["--lr", "2e-3"], f"lr was 0.001 and is 0.002 .*{OVERRIDE}"),
        (["--min-lr", "1e-5"], f"min lr was 0.0 and is 1e-05 .*{OVERRIDE}"),
        (["--weight-decay", "0.1"], f"start weight decay was 0.01 and is 0.1.*{OVERRIDE}"),
        (["--lr-decay-style", "cosine"], f"lr decay style was constant and is cosine.*{OVERRIDE}"),
        (["--lr-warmup-iters", "2"], f"lr warmup iters was 0 and is 2 .*{OVERRIDE}"),
        (["--lr", "2e-3", "--no-load-optim"], f"lr was 0.001 and is 0.002 .*{OVERRIDE}"),
        ([OVERRIDE, "--use-checkpoint-opt-param-scheduler"], "give one of"),
        (["--global-batch-size", "4"], "--global-batch-size is 4, but .* has 8 .*after 24 pairs"),
        (["--global-batch-size", "24", "--allow-changed-run"], "--global-batch-size is 24, but"),
        (["--adam-beta2", "0.9"], "adam beta2 was 0.999 and is 0.9: .*--no-load-optim"),
        (["--clip-grad", "0.1"], "clip_grad is 0.1, but was 1.0.*--allow-changed-run"),
        (["--seq-length", "200"], "seq_length is 200, but was 256"),
        (["--no-save-optim"], "--no-save-optim does not go with a resumed optimizer"),
        (["--finetune"], "--finetune would start a new run in --save"),
    ],
)
def test_refused_in_a_sentence(half, tmp_path, more, said):
    with pytest.raises(RankError, match=said) as failure:
        half(tmp_path / "run", *more, program=PROGRAM)
    assert failure.value.codes == [2] and "Traceback" not in failure.value.logs[0]


def test_more_steps(half, usual, tmp_path):
    """The rate is constant, so nothing is to be decided; the steps in between are the same."""
    longer = half(tmp_path / "run", "--train-iters", "8")[0]
    assert len(usual["steps"]) == 3 and len(longer["steps"]) == 5
    assert longer["steps"][:3] == usual["steps"]


def test_another_rate_keeps_the_optimizer(half, usual, ranks, tmp_path):
    """A rate that hardly differs gives the same losses, which a fresh optimizer does not."""
    more = ["--lr", "1.000001e-3", "--lr-decay-style", "linear", "--lr-decay-iters", "1000000"]
    close = half(tmp_path / "close", *more, OVERRIDE)[0]
    assert "from step 4 on: lr was 0.001 and is 0.001000001, lr decay iters" in ranks.logs[0]
    assert close["rates"] == pytest.approx([1e-3] * 3, rel=1e-4)
    fresh = half(tmp_path / "fresh", *more, OVERRIDE, "--no-load-optim")[0]
    expected = [step["loss"] for step in usual["steps"]]
    assert [step["loss"] for step in close["steps"]] == pytest.approx(expected, rel=1e-4)
    assert [s["loss"] for s in fresh["steps"][1:]] != pytest.approx(expected[1:], rel=1e-2)


@pytest.mark.parametrize("more", [[], ["--no-load-optim"]])
def test_the_new_schedule_goes_on_by_samples(half, ranks, tmp_path, more):
    """Cosine over six steps, of which three are done; and the log says the rate of each step."""
    flags = ["--lr", "2e-3", "--lr-decay-style", "cosine", "--log-interval", "1", OVERRIDE, *more]
    run = half(tmp_path / "run", *flags)[0]
    assert run["rates"] == pytest.approx([1e-3, 5e-4, 1.339746e-4], rel=1e-5)
    logged = re.findall(r"learning rate: (\S+) .*? loss: (\S+)", ranks.logs[0])
    assert [float(rate) for rate, _ in logged] == pytest.approx(run["rates"], rel=1e-5)
    losses = [step["loss"] for step in run["steps"]]
    assert [float(loss) for _, loss in logged] == pytest.approx(losses, rel=1e-5)
    assert ranks.logs[0].count("NOTHING IS SAVED, since there is no --save") == 2


def test_the_old_schedule(half, usual, tmp_path):
    more = ["--lr", "5e-3", "--weight-decay", "0.5", "--use-checkpoint-opt-param-scheduler"]
    assert half(tmp_path / "run", *more)[0]["steps"] == usual["steps"]


def test_no_state_was_saved(half, tmp_path):
    """A run without optimizer state resumes only if told to."""
    run, end = tmp_path / "run", ["--train-iters", "4"]
    half(run, "--no-save-optim", "--no-load-optim", *end, program=PROGRAM)
    with pytest.raises(RankError, match="has no optimizer state: pass --no-load-optim"):
        half(run, program=PROGRAM)


def test_one_step_of_a_warm_up_is_a_step(setup, ranks, tmp_path):
    """At its full rate, and saved though nothing says when."""
    flags = ["--train-iters", "1", "--lr-warmup-fraction", "0.1", "--lr-decay-style", "cosine"]
    argv = setup.flags(setup.sources("both", *BOTH), "--save", str(tmp_path), *flags)
    assert ranks(1, "support.training:train", argv)[0]["rates"] == [1e-3]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "1"


@pytest.mark.parametrize("what", ["zeroed", "cut"])
def test_a_damaged_checkpoint(half, tmp_path, what):
    run = tmp_path / "run"
    with pytest.raises(RankError, match="give one of"):  # copies the run
        half(run, OVERRIDE, "--use-checkpoint-opt-param-scheduler", program=PROGRAM)
    part = run / "iter_0000003" / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    middle = next(i for i in range(len(content) // 2, len(content)) if any(content[i : i + 64]))
    content[middle : middle + 64] = bytes(64)
    part.write_bytes(content if what == "zeroed" else content[:middle])
    said = "is damaged in bytes 0 to" if what == "zeroed" else r"has \d+ bytes, expected"
    with pytest.raises(RankError, match=said) as failure:
        half(run, program=PROGRAM)
    assert failure.value.codes == [2] and "Traceback" not in failure.value.logs[0]


def test_nothing_left(half, ranks, tmp_path):
    half(tmp_path / "run", "--train-iters", "3", program=PROGRAM)
    assert "nothing left to do: the run in" in ranks.logs[0]
    assert "is at step 3 and these flags ask for 3" in ranks.logs[0]


def test_one_folder_is_one_run(half, setup, tmp_path):
    """Another method, another pivot, another --load, or another run that is at it."""
    run = tmp_path / "run"
    with pytest.raises(RankError, match="method.reference is 'initial', but was 'fused'"):
        half(run, "--method", "dpo", program=PROGRAM)
    with pytest.raises(RankError, match="--pretrained-checkpoint is .*qwen, but the run started"):
        half(run, "--pretrained-checkpoint", str(setup.folder / "qwen"), program=PROGRAM)
    shutil.copytree(run, tmp_path / "other")
    with pytest.raises(RankError, match="would be mixed with the one in --load"):
        half(run, "--load", str(tmp_path / "other"), program=PROGRAM)
    lock = RunLock(run)
    lock.take()
    with pytest.raises(RankError, match="--save .* is in use by process") as failure:
        half(run, program=PROGRAM)
    assert failure.value.codes == [2]
    assert lock.held is not None
    lock.held.close()
