"""Scoring jobs: interrupted, resumed, run twice, run with the wrong things."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_infifpo.references.logprob_store import LogprobStore
from support import tiny
from support.launcher import RankError, refused

FILES = (".bin", ".idx", "_sums.npy", "_counts.npy", ".json")


@pytest.fixture(scope="module")
def job(setup, tmp_path_factory):
    """Forty shards of two short records, and a command line for them."""
    folder = tmp_path_factory.mktemp("jobs")
    records = tiny.write_records(folder / "r.jsonl", 80)

    def argv(output: Path, *more: str, model: Path = setup.folder / "qwen") -> list[str]:
        words = ["--backend", "megatron", "--model", str(model), "--input", str(records)]
        return [*words, "--output", str(output), "--shard-records", "2", *more]

    return argv


@pytest.fixture(scope="module")
def whole(job, ranks, tmp_path_factory):
    """The output of an uninterrupted run on one rank."""
    output = tmp_path_factory.mktemp("whole") / "out"
    ranks(1, "support.scoring:score", job(output))
    return output


def assert_same_bytes(a: Path, b: Path) -> None:
    for suffix in FILES:
        assert Path(f"{a}{suffix}").read_bytes() == Path(f"{b}{suffix}").read_bytes(), suffix


def finished(output: Path) -> set[str]:
    return {path.name for path in Path(f"{output}.shards").glob("[0-9]*.npz")}


def test_killed_twenty_times(job, whole, ranks, tmp_path):
    """Any rank, at any time, on one rank or two: no finished shard is lost, no byte changed."""
    dice, left, outputs = random.Random(5), {"scoring": 14, "merging": 6}, 0
    while any(left.values()):
        outputs += 1
        output = tmp_path / f"out{outputs}"
        complete = False
        while not complete:
            before, world = finished(output), dice.choice([1, 2])
            point = dice.choice([name for name, count in left.items() if count] or ["scoring"])
            # Rank 0 merges; the longest delays let a job come to its end.
            victim = 0 if point == "merging" else dice.randrange(world)
            seconds = dice.uniform(0, 0.01 if point == "merging" else 0.25)
            argv = ["support.broken:score_until_killed", job(output), victim, point, seconds]
            try:
                ranks(world, *argv)
                complete = True
            except RankError as error:
                assert -9 in error.codes and set(error.codes) <= {-9, 0, 1, 2}, error
                left[point] = max(0, left[point] - 1)
                if not Path(f"{output}.json").exists():
                    assert before <= finished(output), "a finished shard was lost"
        assert_same_bytes(output, whole)
        assert not Path(f"{output}.shards").exists()


def test_a_finished_job_is_left_alone(job, whole, ranks, tmp_path):
    before = Path(f"{whole}.json").read_bytes()
    ranks(2, "support.scoring:score", job(whole))
    assert "is complete already" in ranks.logs[0]
    assert Path(f"{whole}.json").read_bytes() == before
    sentence = refused(ranks, "tools/score_source.py", job(whole, "--bf16"))
    assert "is of another job: its dtype is 'float32', this one's is 'bfloat16'" in sentence


def test_shards_of_another_job_are_refused(job, setup, ranks, tmp_path):
    """Other weights, same shapes: nothing of the two may be mixed."""
    output = tmp_path / "out"
    with pytest.raises(RankError):
        ranks(1, "support.broken:score_until_killed", job(output), 0, "merging", 0.0)
    other = tiny.save_model(tmp_path / "qwen", "qwen2", vocab_size=290, seed=99)
    sentence = refused(ranks, "tools/score_source.py", job(output, model=other))
    assert "holds shards of another job: its weights_sha256 is" in sentence
    assert len(finished(output)) == 40


@pytest.mark.parametrize("damage", ["garbled", "of other records"])
def test_a_damaged_shard_is_named(job, ranks, tmp_path, damage):
    output = tmp_path / "out"
    with pytest.raises(RankError):
        ranks(1, "support.broken:score_until_killed", job(output), 0, "merging", 0.0)
    shard = Path(f"{output}.shards/000003.npz")
    if damage == "garbled":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
        shard.write_bytes(content)
    else:
        shutil.copy(f"{output}.shards/000004.npz", shard)
    sentence = refused(ranks, "tools/score_source.py", job(output))
    assert str(shard) in sentence
    assert ("is damaged" if damage == "garbled" else "is not of the 2 records") in sentence
    assert not list(tmp_path.glob("out[._]*[!s]")), "only the shards' folder may be there"


@pytest.mark.parametrize("moment", ["scoring", "merging"])
def test_input_that_changes_meanwhile(setup, ranks, tmp_path, moment):
    """On two ranks: told by one, waited for by none, and nothing published or lost."""
    records = tiny.write_records(tmp_path / "r.jsonl", 12)
    argv = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(records)]
    argv += ["--output", str(tmp_path / "out"), "--shard-records", "4"]
    with pytest.raises(RankError) as failure:
        ranks(2, "support.broken:score_while_the_input_shrinks", argv, 8, moment)
    log = "".join(failure.value.logs)
    assert "have changed while they were scored" in log
    assert "Traceback" not in log and 2 in failure.value.codes
    assert not list(tmp_path.glob("out[._]*[!s]"))
    tiny.write_records(tmp_path / "r.jsonl", 12)
    ranks(2, "support.scoring:score", argv)
    assert len(LogprobStore(tmp_path / "out")) == 12


@pytest.mark.parametrize("size, limit, done", [(40, 8_000, 0), (2, 20_000, 40)])
def test_no_space_left(job, ranks, tmp_path, size, limit, done):
    """While a shard is written, and while the shards are merged: told, and then done."""
    output = tmp_path / "out"
    argv = job(output, "--shard-records", str(size))
    with pytest.raises(RankError) as failure:
        ranks(1, "support.broken:score_on_a_full_disk", argv, limit)
    assert failure.value.codes == [2]
    log = failure.value.logs[0]
    assert "error: no space left on the disk" in log and "Traceback" not in log
    assert [path.name for path in tmp_path.iterdir()] == ["out.shards"]
    assert len(finished(output)) == done
    ranks(1, "support.scoring:score", argv)
    assert len(LogprobStore(output)) == 80


def test_no_record_fits(job, ranks, tmp_path):
    sentence = refused(
        ranks, "tools/score_source.py", job(tmp_path / "out", "--context-length", "8")
    )
    expected = "no record can be scored: 80 longer than the context of 8 tokens; choose another"
    assert expected in sentence
    assert not list(tmp_path.glob("out[._]*[!s]"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("a Megatron checkpoint", "needs --backend megatron"),
        ("no weights", "holds neither model.safetensors nor"),
        ("truncated", "model.safetensors: "),
    ],
)
def test_models_that_transformers_cannot_load(setup, ranks, tmp_path, damage, expected):
    model = setup.pivot
    if damage != "a Megatron checkpoint":
        model = tiny.save_model(tmp_path / "m", "llama")
        weights = model / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink() if damage == "no weights" else weights.write_bytes(content[:900])
    argv = ["--backend", "transformers", "--model", str(model), "--input", str(setup.records)]
    sentence = refused(ranks, "tools/score_source.py", [*argv, "--output", str(tmp_path / "out")])
    assert expected in sentence


@pytest.mark.parametrize("dimension", ["tensor", "pipeline"])
def test_a_layout_that_the_ranks_cannot_have(job, ranks, tmp_path, dimension):
    """One who forgot torchrun."""
    flags = (f"--{dimension}-model-parallel-size", "2")
    sentence = refused(ranks, "tools/score_source.py", job(tmp_path / "out", *flags))
    assert "world size (1) is not divisible by total_model_size" in sentence


def test_a_source_without_a_chat_template(setup, ranks, tmp_path):
    base = tiny.save_model(tmp_path / "base", "llama", seed=5)
    (base / "chat_template.jinja").unlink()
    argv = ["--backend", "megatron", "--model", str(base), "--input", str(setup.records)]
    argv += ["--output", str(tmp_path / "out")]
    sentence = refused(ranks, "tools/score_source.py", argv)
    assert "no chat template" in sentence and "--chat-template" in sentence
    assert "cannot read --chat-template nowhere.jinja" in refused(
        ranks, "tools/score_source.py", [*argv, "--chat-template", "nowhere.jinja"]
    )
    ranks(1, "support.scoring:score", [*argv, "--chat-template", "plain"])
    manifest = json.loads((tmp_path / "out.json").read_text())
    prompt = json.loads(setup.records.read_text().splitlines()[0])["prompt"]
    assert manifest["example"]["prompt"] == f"{prompt}\n\n"
    (tmp_path / "mine.jinja").write_text(tiny.TEMPLATE.replace("<|user|>", "Q: "))
    argv[-1] = str(tmp_path / "mine")
    ranks(1, "support.scoring:score", [*argv, "--chat-template", str(tmp_path / "mine.jinja")])
    manifest = json.loads((tmp_path / "mine.json").read_text())
    assert manifest["tokenizer"]["chat_template"] == (tmp_path / "mine.jinja").read_text()


def test_another_models_tokenizer(setup, ranks, tmp_path):
    small = tiny.save_model(tmp_path / "small", "llama", vocab_size=280, seed=5)
    other = tmp_path / "tokenizer"
    tiny.save_tokenizer(other, 300)
    argv = ["--backend", "megatron", "--model", str(small), "--input", str(setup.records)]
    argv += ["--output", str(tmp_path / "out"), "--tokenizer", str(other)]
    assert "another tokenizer than the model's own" in refused(ranks, "tools/score_source.py", argv)
    for path in small.glob("tokenizer*"):
        path.unlink()
    sentence = refused(ranks, "tools/score_source.py", argv)
    assert "but the model has 280 tokens: it is another model's tokenizer" in sentence
    assert not list(tmp_path.glob("out.[bij]*"))


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--domains", "law"], "--domains names 'law', expected some of code, general"),
        (["--absent-domains", "mask"], "--absent-domains has no effect without --domains"),
        (["--context-length", "600"], "takes 512 tokens"),
        (["--trust-remote-code"], "no effect with --backend megatron"),
        (["--output", "/dev/null/out"], "cannot write to /dev/null"),
    ],
)
def test_flags_that_do_not_fit(job, ranks, tmp_path, more, expected):
    assert expected in refused(ranks, "tools/score_source.py", job(tmp_path / "out", *more))
    assert not list(tmp_path.iterdir())
