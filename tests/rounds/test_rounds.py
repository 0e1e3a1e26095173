"""Two rounds of real commands on tiny models, on two ranks of training."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.rounds.run import run_rounds
from support import tiny
from support.launcher import RankError
from support.round_stages import Killed

JUDGE = """
def vowels(prompt, response):
    return sum(letter in "aeiou" for letter in response) / max(1, len(response))
"""
TRAIN = (
    "--lr 1e-2 --global-batch-size 4 --micro-batch-size 1 --seq-length 128 --clip-grad 1.0 "
    "--use-distributed-optimizer"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A pivot, a source, a judge and prompts."""
    folder = tmp_path_factory.mktemp("rounds")
    tiny.save_model(folder / "hf", "llama", seed=1)
    source = tiny.save_model(folder / "qwen", "qwen2", vocab_size=290, seed=2)
    (folder / "judge.py").write_text(JUDGE)
    with (folder / "prompts.jsonl").open("w") as file:
        for i, text in enumerate(tiny.WORDS[:8]):
            domain = "general" if i else "code"
            file.write(json.dumps({"id": f"p{i}", "domain": domain, "prompt": text}) + "\n")
    (folder / "sources.yaml").write_text(
        "initial: {logprobs: a, weight: 0.6}\n"
        "sources: [{name: qwen, logprobs: b, weight: 0.4, domains: [code], "
        f"score: {{model: {source}}}}}]\n"
    )
    return folder


def make(inputs: Path, output: Path, **more: Any) -> RoundsJob:
    # A random model hardly ever ends its turn.
    label = f"--program {inputs / 'judge.py'}:vowels"
    label += " --keep-cut" if more["method"] == "infifpo" else ""
    options = {"sample": "--max-tokens 12", "label": label, "train": TRAIN}
    given: dict[str, Any] = {
        "rounds": 2, "steps": 2, "round_prompts": 4, "count": 3, "options": options,
        "sources": str(inputs / "sources.yaml"), "launcher": "torchrun --nproc-per-node 2",
    }  # fmt: skip
    files: dict[str, Any] = {
        "pivot": str(inputs / "hf"),
        "prompts": [str(inputs / "prompts.jsonl")],
    }
    return RoundsJob(output=output, **files, **given | more)


class Forked:
    """Runs commands on forked ranks instead of starting Python each time; `ran` has their names."""

    def __init__(self, ranks) -> None:
        self.ranks, self.ran = ranks, list[str]()

    def __call__(self, words: list[str], log: Path) -> int:
        name, *rest = words[words.index("megatron_infifpo") + 1 :]
        self.ran.append(name)
        world = 2 if words[0] == "torchrun" else 1
        try:
            self.ranks(world, "support.tools:command", "megatron_infifpo", [name, *rest])
        except RankError as error:
            log.write_text(str(error))
            return error.codes[0]
        log.write_text("\n".join(self.ranks.logs))
        return 0


@pytest.fixture
def start(ranks):
    return Forked(ranks)


def test_two_rounds(inputs, tmp_path, start):
    """One training run goes through both, and one killed twice ends with the same bits."""
    run_rounds(make(inputs, tmp_path / "alone", method="fuserlhf"), start)
    rows = [json.loads(line) for line in (tmp_path / "alone" / "rounds.jsonl").open()]
    assert [row["round"] for row in rows] == [0, 1]
    first, second = (row["training"]["first"] for row in rows)
    # The first samples are the initial pivot's own, the second ones those of what was trained.
    assert abs(first["kl/initial"]) < 1e-4 < abs(second["kl/initial"])
    # Both sides of a round's first step see the same samples, with the same rewards.
    assert all(0 < row["reward"] < 1 for row in rows)
    run = json.loads((tmp_path / "alone" / "checkpoint" / "run.json").read_text())
    # One round has the prompt that the source is for, the other has its log-probs masked.
    seen = [each["data"]["sources"]["qwen"]["takes_part_in"] for each in run["rounds"]]
    assert sorted(seen) == [0, 1]

    def killed(words: list[str], log: Path) -> int:
        code = start(words, log)
        if start.ran[-1] in dying:
            dying.remove(start.ran[-1])
            raise Killed
        return code

    job, dying = make(inputs, tmp_path / "killed", method="fuserlhf"), {"sample", "train"}
    for _ in range(2):
        with pytest.raises(Killed):
            run_rounds(job, killed)
    dying.add("train")
    with pytest.raises(Killed):
        run_rounds(job, killed)
    run_rounds(job, killed)
    for number in range(2):
        hf = f"round-{number:03d}/hf"
        tiny.assert_same_weights(tmp_path / "alone" / hf, job.output / hf)
    # A third round that samples from the weights of the first one is refused.
    shutil.rmtree(job.output / "round-001" / "hf")
    shutil.copytree(job.output / "round-000" / "hf", job.output / "round-001" / "hf")
    with pytest.raises(UserError, match="round-002: the stage train ended with 2"):
        run_rounds(make(inputs, job.output, method="fuserlhf", rounds=3), start)
    assert "stale" in (job.output / "round-002" / "logs" / "train.log").read_text()


def test_iterated_pairs(inputs, tmp_path, start):
    """Best and worst of each round, an optimizer a round, references of the first pivot."""
    job = make(inputs, tmp_path / "out", method="infifpo", optimizer="fresh", keep_rounds=1)
    run_rounds(job, start)
    rows = [json.loads(line) for line in (job.output / "rounds.jsonl").open()]
    assert [row["round"] for row in rows] == [0, 1]
    assert [(job.output / f"round-00{n}" / "hf").exists() for n in (0, 1)] == [False, True]
    record = json.loads((job.output / "round-001" / "records.jsonl").open().readline())
    assert {"chosen", "rejected"} <= record.keys()
    manifests = [
        json.loads((job.output / f"round-00{n}" / "logprobs" / "initial.json").read_text())
        for n in (0, 1)
    ]
    assert manifests[0]["weights_sha256"] == manifests[1]["weights_sha256"]


def test_pad(inputs, tmp_path, start):
    """Neither judge nor scores: lists straight from the sampler."""
    options = {"sample": "--max-tokens 12", "train": TRAIN}
    job = make(inputs, tmp_path / "out", method="pad", rounds=1, options=options)
    job.output.parent.mkdir(exist_ok=True)
    (tmp_path / "plain.yaml").write_text(
        f"initial: a\nsources: [{{name: qwen, logprobs: b, score: {{model: {inputs / 'qwen'}}}}}]\n"
    )
    run_rounds(job, start)
    assert "label" not in start.ran
    (row,) = [json.loads(line) for line in (job.output / "rounds.jsonl").open()]
    assert row["reward"] is None and row["training"]["first"]["loss"] > 0


def test_sft(inputs, tmp_path, start):
    """Rejection sampling: the best response of each prompt, without references."""
    label = f"--program {inputs / 'judge.py'}:vowels --keep-cut"
    options = {"sample": "--max-tokens 12", "label": label, "train": TRAIN}
    given = {"rounds": 1, "sources": None, "options": options}
    job = make(inputs, tmp_path / "out", method="sft", **given)
    run_rounds(job, start)
    assert "score" not in start.ran and (job.output / "round-000" / "hf").exists()
