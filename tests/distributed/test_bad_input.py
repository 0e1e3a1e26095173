"""Bad input to training and scoring: one sentence, exit code 2, no traceback, nothing written."""

import json
import os
import pickle
import shutil

import pytest

from support import tiny
from support.launcher import ROOT, refused

TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.fixture
def flags(setup, tmp_path):
    """A good command line, less some flags, plus others."""
    sources = setup.sources("bad", "{name: qwen, logprobs: qwen}")

    def make(*more: str, without: tuple[str, ...] = ()) -> list[str]:
        argv = setup.flags(sources, "--save", str(tmp_path / "run"), "--save-interval", "3")
        for flag in without:
            position = argv.index(flag)
            del argv[position : position + 2]
        return [*argv, *more]

    yield make
    assert not (tmp_path / "run").exists(), "a refused run must write nothing"


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--method dpo --clip", "--clip has no effect with --method dpo"),
        ("--fusion average --selection pair", "--selection has no effect with --fusion average"),
        ("--alpha 0.2", "--alpha has no effect with the objective dpo"),
        ("--method sft", "--preference-sources has no effect with --method sft"),
        ("--preference-valid-sources x.yaml", "no effect without --preference-valid-data"),
        ("--preference-epochs 2", "--preference-epochs has no effect with --train-iters"),
        ("--objective aot --micro-batch-size 1", "--objective aot compares the pairs of a row"),
        ("--sft", "use --method sft"),
        ("--micro-batch-tokens 900", "one of --micro-batch-size (pairs) and --micro-batch-tokens"),
        ("--method sft --share-prompt", "--preference-sources has no effect"),
    ],
)
def test_option_without_effect(flags, ranks, options, expected):
    assert expected in refused(ranks, "megatron_infifpo.train", flags(*options.split()))


@pytest.mark.parametrize("method", ["wrpo", "infifpo-wrpo"])
def test_wrpo_needs_the_pivots_own_response(setup, flags, ranks, tmp_path, method):
    records = tiny.write_records(tmp_path / "two.jsonl", 8, pivot_chosen=False)
    prepare = ["--input", str(records), "--tokenizer", str(setup.hf)]
    ranks(
        1,
        "support.tools:run_tool",
        "prepare_preferences",
        [*prepare, "--output", str(tmp_path / "d")],
    )
    argv = flags("--method", method, "--preference-data", str(tmp_path / "d"))
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "record 'two-0'" in sentence and "has no 'pivot_chosen'" in sentence


def test_held_out_sources_are_those_of_training(setup, flags, ranks):
    other = setup.sources("other", "{name: phi, logprobs: phi}")
    valid = ["--preference-valid-data", str(setup.data), "--preference-valid-sources", str(other)]
    sentence = refused(ranks, "megatron_infifpo.train", flags(*valid))
    assert "lists the sources phi; expected those of" in sentence and "order: qwen" in sentence


def test_missing_checkpoint(flags, ranks, tmp_path):
    argv = flags(
        "--pretrained-checkpoint", str(tmp_path / "no"), without=("--pretrained-checkpoint",)
    )
    assert "no checkpoint in" in refused(ranks, "megatron_infifpo.train", argv)


def test_impossible_tensor_parallel_size(setup, flags, ranks, tmp_path):
    """Phi-4 has 10 key-value heads; so has this one."""
    shape = {"num_attention_heads": 20, "num_key_value_heads": 10, "hidden_size": 160}
    phi = tiny.save_model(tmp_path / "phi", "phi3", intermediate_size=160, **shape)
    ranks(1, "support.tools:run_tool", "convert_checkpoint",
          ["import", "--hf", str(phi), "--save", str(tmp_path / "phi-megatron")])  # fmt: skip
    argv = flags(
        "--pretrained-checkpoint", str(tmp_path / "phi-megatron"),
        "--tensor-model-parallel-size", "4", without=("--pretrained-checkpoint",),
    )  # fmt: skip
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "expected one of 1, 2, 5, 10" in sentence and "10 key-value heads" in sentence
    score = ["--backend", "megatron", "--model", str(phi), "--input", str(setup.records)]
    score += ["--output", str(tmp_path / "out"), "--tensor-model-parallel-size", "4"]
    assert "expected one of 1, 2, 5, 10" in refused(ranks, "tools/score_source.py", score)
    assert not list(tmp_path.glob("out*"))


def test_impossible_pipeline_parallel_size(setup, flags, ranks, tmp_path):
    sentence = refused(
        ranks, "megatron_infifpo.train", flags("--pipeline-model-parallel-size", "3")
    )
    assert "expected one of 1, 2, 4: it must divide the model's 4 layers" in sentence
    score = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(setup.records)]
    score += ["--output", str(tmp_path / "out"), "--pipeline-model-parallel-size", "3"]
    assert "expected one of 1, 2, 4" in refused(ranks, "tools/score_source.py", score)
    virtual = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "3"]
    sentence = refused(ranks, "megatron_infifpo.train", flags(*virtual))
    assert "3 virtual stages a pipeline rank, expected one of 1, 2" in sentence


def test_architecture_flag_against_the_checkpoint(flags, ranks):
    sentence = refused(ranks, "megatron_infifpo.train", flags("--num-layers", "12"))
    assert "--num-layers is 12, but the checkpoint" in sentence


def test_log_probs_of_other_pairs(setup, flags, ranks, tmp_path):
    other = tiny.write_records(tmp_path / "other.jsonl", 20, seed=99)
    argv = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(other)]
    ranks(1, "support.scoring:score", [*argv, "--output", str(tmp_path / "other")])
    sources = tmp_path / "sources.yaml"
    sources.write_text(
        f"initial: {setup.folder}/initial\nsources: [{{name: other, logprobs: other}}]\n"
    )
    argv = flags("--preference-sources", str(sources), without=("--preference-sources",))
    assert "log-probs of other records" in refused(ranks, "megatron_infifpo.train", argv)


def test_initial_log_probs_of_another_tokenizer(setup, flags, ranks):
    sources = setup.folder / "swapped.yaml"
    sources.write_text("initial: qwen\nsources: [{name: phi, logprobs: phi}]\n")
    argv = flags("--preference-sources", str(sources), without=("--preference-sources",))
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "lengths of the responses" in sentence or "tokenizer" in sentence


def test_another_chat_template_than_the_pivots(setup, flags, ranks, tmp_path):
    pivot = shutil.copytree(setup.pivot, tmp_path / "pivot")
    template = pivot / "hf" / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|end|>'", "' <|end|>'"))
    argv = flags("--pretrained-checkpoint", str(pivot), without=("--pretrained-checkpoint",))
    sentence = refused(ranks, "megatron_infifpo.train", argv)
    assert "another chat template" in sentence and "--tokenizer-check warn" in sentence


def test_log_probs_of_other_weights(setup, flags, ranks, tmp_path):
    """The same tokenizer and architecture, but not the pivot that training starts from."""
    other = tiny.save_model(tmp_path / "hf", "llama", seed=77)
    ranks(1, "support.tools:run_tool", "convert_checkpoint",
          ["import", "--hf", str(other), "--save", str(tmp_path / "other")])  # fmt: skip
    argv = flags(
        "--pretrained-checkpoint", str(tmp_path / "other"), without=("--pretrained-checkpoint",)
    )
    assert "of other weights" in refused(ranks, "megatron_infifpo.train", argv)


@pytest.mark.parametrize(
    "option",
    [["--hybrid-context-parallel"], ["--hidden-dropout", "0.3"], ["--use-megatron-fsdp"]],
)
def test_megatron_features_that_do_not_fit(flags, ranks, option):
    assert option[0] in refused(ranks, "megatron_infifpo.train", flags(*option))


@pytest.mark.parametrize(
    "program",
    ["megatron_infifpo.train", *(f"tools/{name}.py" for name in TOOLS)],
)
def test_help(ranks, program):
    ranks(1, "support.tools:command", program, ["--help"])
    assert "usage:" in ranks.logs[0]


def test_no_pair_fits(flags, ranks):
    argv = flags("--seq-length", "8", without=("--seq-length",))
    assert "--seq-length" in refused(ranks, "megatron_infifpo.train", argv)


@pytest.mark.parametrize(
    "change, expected",
    [
        ("{", "broken.jsonl:3"),
        (json.dumps({"id": "x", "prompt": "p", "chosen": "a"}), "rejected"),
        (json.dumps({"id": "x", "prompt": "p", "chosen": " ", "rejected": "b"}), "empty"),
        (json.dumps({"id": "x", "prompt": "p", "chosen": "a", "rejected": "a"}), "equal"),
        (json.dumps({"id": "train-0", "prompt": "p", "chosen": "a", "rejected": "b"}), "train-0"),
    ],
    ids=["broken JSON", "missing field", "empty response", "equal responses", "duplicate id"],
)
def test_bad_records(setup, ranks, tmp_path, change, expected):
    lines = setup.records.read_text().splitlines()
    lines[2] = change
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines) + "\n")
    prepare = ["--input", str(broken), "--tokenizer", str(setup.hf)]
    prepare += ["--output", str(tmp_path / "out")]
    sentence = refused(ranks, "tools/prepare_preferences.py", prepare)
    assert "broken.jsonl:3" in sentence and expected in sentence
    score = ["--backend", "transformers", "--model", str(setup.hf), "--input", str(broken)]
    score += ["--output", str(tmp_path / "out")]
    assert "broken.jsonl:3" in refused(ranks, "tools/score_source.py", score)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("program", ["megatron_infifpo.train", "tools/score_source.py"])
def test_a_checkpoint_cannot_run_code(setup, ranks, tmp_path, program):
    """PyTorch would unpickle its metadata; it is refused before that."""
    hostile, trace = tmp_path / "pivot", tmp_path / "trace"
    shutil.copytree(setup.pivot, hostile)

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {trace}",)

    (hostile / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))
    argv = setup.flags(setup.sources("own", "{name: pivot, logprobs: initial}"))
    argv[argv.index("--pretrained-checkpoint") + 1] = str(hostile)
    if program.startswith("tools/"):
        argv = ["--backend", "megatron", "--model", str(hostile), "--input", str(setup.records)]
        argv += ["--output", str(tmp_path / "out")]
    assert "is not part of a checkpoint's metadata" in refused(ranks, program, argv)
    assert not trace.exists()
