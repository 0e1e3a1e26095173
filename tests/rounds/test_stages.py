"""Command lines of the stages, word for word; what is refused before anything runs."""

import json
import re
from pathlib import Path

import pytest

from megatron_infifpo.commands.main import run_words
from megatron_infifpo.errors import UserError
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rounds.run import command
from megatron_infifpo.rounds.stages import (
    RoundFolder,
    import_pivot,
    read_flags,
    sources_yaml,
    stages_of,
)

TRAIN = (
    "--lr-decay-style constant --save-interval 5 --log-interval 1 --tensorboard-log-interval 1 "
    "--tensorboard-dir {save}/tensorboard --exit-signal-handler"
)


def words(job, number: int) -> list[str]:
    return [" ".join(stage.job.arguments) for stage in stages_of(job, number)]


def test_a_round(make_job):
    options = {
        "import": "--dtype bf16", "sample": "--engine vllm --bf16", "prepare": "--score all",
        "label": "--program judge.py:score --cut-penalty 1", "train": "--lr 1e-6 --bf16",
        "score": "--bf16 --tensor-model-parallel-size 2",
        "initial": "--tensor-model-parallel-size 1 --chat-template plain",
    }  # fmt: skip
    job = make_job(options=options)
    assert import_pivot(job).job.arguments == (
        "import", "--hf", "hf", "--save", "out/pivot", "--dtype", "bf16",
    )  # fmt: skip
    here, score = "out/round-001", "--input out/round-001/records.jsonl --output out/round-001"
    assert words(job, 1) == [
        f"sample --model out/round-000/hf --name policy --input {here}/prompts.jsonl "
        f"--output {here}/responses.jsonl --count 3 --temperature 1 --top-p 1 --seed 1235 "
        "--keep-cut --engine vllm --bf16",
        f"label --input {here}/responses.jsonl --output {here}/records.jsonl --list 3 --keep-cut "
        "--program judge.py:score --cut-penalty 1",
        f"prepare --input {here}/records.jsonl --tokenizer hf --output {here}/tokens --score all",
        "score --backend megatron --bf16 --tensor-model-parallel-size 1 --model out/pivot "
        f"--chat-template plain --name initial {score}/logprobs/initial",
        f"score --backend transformers --bf16 --model one --name one {score}/logprobs/one",
        "score --backend megatron --bf16 --tensor-model-parallel-size 4 --model two "
        f"--name two {score}/logprobs/two --domains code "
        "--absent-domains mask",
        f"train --method fuserlhf --preference-data {here}/tokens "
        f"--preference-sources {here}/sources.yaml --stop-at 10 --next-round "
        "--pretrained-checkpoint out/pivot --save out/checkpoint --train-iters 15 "
        f"--sampler-logprobs {here}/responses.jsonl.measured "
        f"{TRAIN.format(save='out/checkpoint')} --lr 1e-6 --bf16",
        f"export --load out/checkpoint --save {here}/hf",
    ]
    assert words(job, 0)[0].startswith("sample --model hf --name policy")
    reading = words(make_job(options=options, on_bad_record="skip"), 1)[:6]
    assert all("--on-bad-record skip" in stage for stage in reading)


def test_a_fresh_optimizer(make_job):
    job = make_job(optimizer="fresh", sampler_check=False)
    first, second = words(job, 0), words(job, 1)
    assert first[0].endswith("--keep-cut --check 0")
    assert first[-2] == (
        "train --method fuserlhf --preference-data out/round-000/tokens "
        "--preference-sources out/round-000/sources.yaml --pretrained-checkpoint out/pivot "
        "--save out/round-000/checkpoint --train-iters 5 "
        + TRAIN.format(save="out/round-000/checkpoint")
    )
    assert (
        "--preference-sources out/round-001/sources.yaml --reference-check off "
        "--pretrained-checkpoint out/round-000/checkpoint --save out/round-001/checkpoint "
    ) in second[-2]


def test_by_method(make_job):
    """Pairs are labelled without a list, PAD is not labelled, DPO has no sources, SFT no scores."""

    def names(**more):
        return [stage.name for stage in stages_of(make_job(**more), 0)]

    both, rest = ["sample", "label", "prepare"], ["train", "export"]
    assert names(method="infifpo") == [*both, "score-initial", "score-one", "score-two", *rest]
    assert names(method="dpo", sources=None) == [*both, "score-initial", *rest]
    assert names(method="sft", sources=None) == [*both, *rest]
    assert names(method="pad", options={}) == [
        "sample", "prepare", "score-initial", "score-one", "score-two", *rest,
    ]  # fmt: skip
    plain = {"label": "--program judge.py:score", "train": "--reference initial"}
    assert names(sources=None, options=plain) == [*both, "score-initial", *rest]
    pairs = words(make_job(method="infifpo"), 0)
    assert pairs[1].endswith("--output out/round-000/records.jsonl --program judge.py:score")
    pad = words(make_job(method="pad", options={}), 0)
    for line in pad[1:5]:
        assert "--input out/round-000/responses.jsonl" in line and "--on-bad-record skip" in line
    assert "--preference-sources" not in words(make_job(method="sft", sources=None), 0)[-2]


def test_sources_of_a_round(make_job):
    """Weights stay the user's; what is outside a source's domains is masked in its log-probs."""
    job = make_job()
    here = RoundFolder(job, 1)
    here.path.mkdir(parents=True)
    here.sources.write_text(sources_yaml(job, here))
    found = read_sources(here.sources)
    assert found.initial == "out/round-001/logprobs/initial"
    assert found.weights == (0.3, 0.2, 0.5)
    assert [(source.name, source.logprobs, source.domains) for source in found.sources] == [
        (name, f"out/round-001/logprobs/{name}", None) for name in ("one", "two")
    ]
    given = Path("sources.yaml").read_text()
    accurate = given.replace("{name: one,", "{name: one, accuracy: {math: 0.4, code: 0.6},")
    Path("sources.yaml").write_text(accurate.replace("{name: two,", "{name: two, accuracy: 0.5,"))
    here.sources.write_text(sources_yaml(make_job(), here))
    known = [source.accuracy for source in read_sources(here.sources).sources]
    assert known == [{"math": 0.4, "code": 0.6}, 0.5], "whichever domains the round has"
    job = make_job(method="dpo", sources=None)
    assert json.loads(sources_yaml(job, here)) == {"initial": "logprobs/initial", "sources": []}


def test_what_starts_a_stage(make_job):
    sample, *_, train, _ = stages_of(make_job(), 0)
    job = make_job(launcher="torchrun --nproc-per-node 8")
    assert command(job, train.job)[:5] == [
        "torchrun", "--nproc-per-node", "8", "-m", "megatron_infifpo",
    ]  # fmt: skip
    assert command(job, sample.job)[1:4] == ["-m", "megatron_infifpo", "sample"]
    job = make_job(launcher="srun --wait=60 python -u", python="srun -n1 '/a b/python3'")
    assert command(job, train.job)[:5] == ["srun", "--wait=60", "python", "-u", "-m"]
    assert command(job, sample.job)[:4] == ["srun", "-n1", "/a b/python3", "-m"]
    assert command(make_job(python="python"), train.job)[:2] == ["python", "-m"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "wrpo", "sources": None}, "wrpo compares the pivot's own best"),
        ({"method": "fusellm", "sources": None}, "fusellm learns from sources' distributions"),
        ({"method": "best"}, "--method is 'best', expected one of"),
        ({"sources": None}, "fuserlhf reads sources: give --sources FILE"),
        ({"method": "dpo"}, "dpo reads no sources: --sources has no effect"),
        ({"method": "pad"}, "--label-options has no effect: --method pad has no judge"),
        ({"options": {}}, "fuserlhf needs scores: give --label-options '--program"),
        (
            {"method": "sft", "sources": None, "options": {"initial": "--bf16"}},
            "--initial-options has no effect: --method sft has no reference",
        ),
        ({"until": 3}, "--until is 3, expected one of 0 to 2"),
        ({"options": {"train": "--fusion best"}}, "--train-options: argument --fusion: invalid"),
        ({"options": {"train": "--alpha 1"}}, "--alpha has no effect"),
        ({"count": 1}, "--count is 1, expected a whole number of at least 2"),
        ({"launcher": "srun"}, "--launcher is 'srun', expected what runs Python"),
        ({"launcher": "srun 'python"}, "--launcher=srun 'python: No closing quotation"),
        ({"sources": "same.yaml"}, "a file called a-b would be of two models"),
        ({"sources": "initial.yaml"}, "a file called initial would be of two models"),
        ({"sources": "silent.yaml"}, "source 'a' does not say which model it is"),
    ],
)
def test_refused(make_job, given, message):
    for name, entries in (
        ("same", "{name: a b, logprobs: a, score: {model: a}}, {name: a/b, logprobs: b}"),
        ("initial", "{name: initial, logprobs: a, score: {model: a}}"),
        ("silent", "{name: a, logprobs: a}"),
    ):
        Path(f"{name}.yaml").write_text(f"initial: x\nsources: [{entries}]\n")
    with pytest.raises(UserError, match=message):
        make_job(**given)


@pytest.mark.parametrize(
    ("stage", "option", "flag"),
    [
        ("sample", "--temperature 0.8", "--temperature"),
        ("label", "--program a.py:b --list 4", "--list"),
        ("score", "--input x", "--input"),
        ("score", "--model x", "--model"),
        ("initial", "--output x", "--output"),
        ("train", "--save=elsewhere", "--save"),
        ("export", "--load x", "--load"),
    ],
)
def test_flags_of_rounds_themselves(make_job, stage, option, flag):
    job = make_job(options={"label": "--program a.py:b", stage: option})
    with pytest.raises(UserError, match=f"--{stage}-options has {flag}, which rounds give"):
        stages_of(job, 0)


def test_usual_flags_give_way(make_job):
    options = {"label": "--program a.py:b", "train": "--lr-decay-style cosine --save-interval=2"}
    train = words(make_job(options=options), 0)[-2]
    assert train.count("--lr-decay-style") == train.count("--save-interval") == 1
    assert train.endswith("--lr-decay-style cosine --save-interval=2")


def test_words_as_flags():
    read = read_flags(["--bf16", "--domains", "a", "b", "--model=x y", "--shard-records", "4"])
    assert read == {"bf16": True, "domains": ["a", "b"], "model": "x y", "shard-records": "4"}
    with pytest.raises(UserError, match="bf16: expected flags"):
        read_flags(["bf16"])


COMMAND = (
    "rounds --output out --pivot hf --prompts prompts.jsonl --method fuserlhf "
    "--rounds 2 --steps 5 --round-prompts 4 --count 3 --until 1"
).split()
TRAINING = "--lr 1e-6 --global-batch-size 4 --micro-batch-size 1 --seq-length 64"


def test_dry_run(make_job, capsys):
    """All commands of all rounds, and nothing else happens."""
    options = ["--label-options", "--program judge.py:score", "--score-options", "--bf16"]
    options += ["--sources", "sources.yaml"]
    options += ["--launcher", "torchrun --nproc-per-node 2", "--train-options", TRAINING]
    assert run_words([*COMMAND, *options, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["# once", "infifpo import --hf hf --save out/pivot"]
    assert [line for line in lines if line.startswith("#")][1:] == [
        "# round 0", "# round 1",
    ]  # fmt: skip
    trained = [line for line in lines if " train " in line]
    assert len(trained) == 2 and all(
        line.startswith("torchrun --nproc-per-node 2 -m megatron_infifpo train --method fuserlhf")
        for line in trained
    )
    assert any("score --backend megatron --bf16 --model out/pivot" in line for line in lines)
    assert not Path("out").exists()


TOKENS = TRAINING.replace("--micro-batch-size 1", "--micro-batch-tokens 150")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--train-options", f"{TRAINING} --learning-rate 1"],
         "--train-options: unrecognized arguments: --learning-rate 1"),
        (["--train-options", "--lr 1e-6"], "train: give one of --micro-batch-size"),
        (["--sample-options", "--engine vlm"], "invalid choice"),
        (["--sample-options", "--top-k 3"], "--sample-options: unrecognized arguments: --top-k 3"),
        (["--sample-options", "--check-tolerance -1"], "sample: --check-tolerance is -1"),
        (["--score-options", "--backend jax"],
         "--score-options or --initial-options: argument --backend: invalid choice"),
        (["--score-options", "--context-length 8 --trust-remote-code"],
         "score-initial: --trust-remote-code has no effect with --backend megatron"),
        (["--label-options", "--program judge.py:score --cut-penalty 1", "--method", "dpo"],
         "label: --cut-penalty has no effect without --list"),
        (["--prepare-options", "--chat-template-options 3"], "prepare: --chat-template-options is"),
        # The first round's words can be read, and the last one's cannot.
        (["--optimizer", "fresh", "--train-options", f"{TRAINING} --reference-check off"],
         "--train-options has --reference-check, which rounds give themselves"),
        (["--sample-options", "--engine server --server http://localhost:1/v1"],
         "--sample-options has --engine server, with which no log-probs"),
        (["--sample-options", "--check 0"], "--sample-options has --check 0, with which"),
        (["--train-options", TOKENS, "--sample-options", "--max-tokens 51"],
         "3 responses of 51 tokens, which sampling may give, are 153, and a record is one row"),
        (["--train-options", TOKENS, "--sample-options", "--max-tokens 5000"],
         "3 responses of 64 tokens, which sampling may give, are 192, .*lower --count or"),
        (["--train-options", TOKENS.replace("150", "99"), "--method", "dpo"],
         "2 responses of 64 tokens, .* lower --max-tokens in"),
    ],
)  # fmt: skip
def test_words_that_a_stage_cannot_read(make_job, capsys, option, message):
    """They are found before the first stage has run for hours."""
    given = {"--label-options": "--program judge.py:score", "--train-options": TRAINING}
    given |= dict(zip(option[::2], option[1::2], strict=True))
    sources = [] if "dpo" in option else ["--sources", "sources.yaml"]
    words = [word for one in given.items() for word in one]
    with pytest.raises((SystemExit, UserError)) as caught:
        run_words([*COMMAND, *sources, *words])
    assert re.search(message, capsys.readouterr().err + str(caught.value))
    assert not Path("out").exists()


def test_inputs_that_are_not_there(make_job, capsys):
    """So are they; and it is said how often a round goes over its prompts."""
    make_job()
    words = ["--method", "dpo", "--train-options", TRAINING]
    with pytest.raises(UserError, match="^--program lost.py:score: lost.py: no such file$"):
        run_words([*COMMAND, *words, "--label-options", "--program lost.py:score"])
    assert capsys.readouterr().out == (
        "a round is 5 steps of 4 records: 5.00 times its 4 prompts\n"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "option",
    [
        ["--train-options", TOKENS, "--sample-options", "--max-tokens 50"],
        ["--train-options", TOKENS, "--method", "dpo"],
        ["--no-sampler-check", "--sample-options", "--engine server --server http://localhost:1"],
        ["--optimizer", "fresh", "--rounds", "1", "--until", "0", "--train-options",
         f"{TRAINING} --reference-check off"],
    ],
)  # fmt: skip
def test_words_that_go_together(make_job, option):
    words = ["--label-options", "--program judge.py:score"]
    words += [] if "dpo" in option else ["--sources", "sources.yaml"]
    words += [] if "--train-options" in option else ["--train-options", TRAINING]
    assert run_words([*COMMAND, *words, *option, "--dry-run"]) == 0
