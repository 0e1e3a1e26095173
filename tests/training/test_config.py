"""A run's configuration: of words or of a file, checked once, and Megatron's arguments of it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.commands.main import make_parser, run_command
from megatron_infifpo.engine.layer_kind import KINDS, choose_kind
from megatron_infifpo.errors import UserError
from megatron_infifpo.training.config import RunConfig, run_parser
from megatron_infifpo.training.data import open_datasets
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.megatron_args import megatron_args, rows_of
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import find_start

WORDS = ["--preference-data", "pairs", "--preference-sources", "sources.yaml", "--lr", "1e-7",
         "--global-batch-size", "8", "--micro-batch-size", "2"]  # fmt: skip
FILE = """\
preference-data: pairs
preference_sources: sources.yaml
lr: 1e-7
global-batch-size: 8
micro-batch-size: 2
"""


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "run.yaml"


def made(*more: str) -> RunConfig:
    return RunConfig.from_arguments([*WORDS, *more])


def test_frozen():
    config: Any = made()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.preference_data = "others"
    with pytest.raises(TypeError):
        config.flags["lr"] = 1.0
    assert dataclasses.replace(config, preference_data="others").preference_data == "others"


def test_a_file_is_a_command_line(file):
    file.write_text(FILE)
    assert RunConfig.from_file(file) == made() != made("--bf16")
    file.write_text(
        f"{FILE}\nshare-prompt: false\nbf16: true\nsequence-parallel: false\ntrain-iters: null\n"
        "no-rope-fusion: true\nprofile-ranks: [0, 3]\nprofile: true\nuse-pytorch-profiler: true\n"
        "tensorboard_dir: logs\nbeta: 0.5\n"
    )
    expected = made(
        "--no-share-prompt", "--bf16", "--no-rope-fusion", "--profile-ranks", "0", "3", "--profile",
        "--use-pytorch-profiler", "--tensorboard-dir", "logs", "--beta", "0.5",
    )  # fmt: skip
    assert RunConfig.from_file(file) == expected
    assert expected.method.beta == 0.5 and expected.share_prompt is False


def test_the_command_line_goes_before_the_file(file):
    file.write_text(FILE)
    for words in (["--lr", "1", "--config", str(file)], ["--config", str(file), "--lr", "1"]):
        config = RunConfig.from_arguments(words)
        assert (config.flags["lr"], config.flags["micro_batch_size"]) == (1.0, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "run.yaml: lrr is no flag of a run, expected lr of infifpo train --help"),
        ("zzzzzz: 1", "zzzzzz is no flag of a run, expected one of infifpo train --help"),
        ("lr: 1\nbeta: 2\nlr: 3", "cannot be read: lr is given twice, in lines 1 and 3"),
        ("lr: 1\n--lr: 3", "cannot be read: --lr is given twice, in lines 1 and 2"),
        ("share_prompt: true\nshare-prompt: true", "share-prompt is given twice, in lines 1 and 2"),
        ("environment: true", "environment is no flag"),
        ("config: others.yaml", "config is no flag"),
        ("bf16: 3", "bf16 is '3', expected true or false: the flag takes no value"),
        ("lr: true", "lr is True, expected a value"),
        ("lr: [1, 2]", "lr is .'1', '2'., expected a value"),
        ("bf16: yes", "bf16 is 'yes', expected true or false"),
        ("seed: 1:30", "run.yaml: argument --seed: invalid int value: '1:30'"),
        ("profile-ranks: {a: 1}", "profile-ranks is .*, expected a list"),
        ("lr: much", "run.yaml: argument --lr: invalid float value: 'much'"),
        ("tokenizer-check: no", "run.yaml: argument --tokenizer-check: invalid choice: 'no'"),
        ("- lr", "run.yaml holds no flags: expected `name: value`, one a line"),
        ("lr: [", "run.yaml cannot be read: while parsing"),
        ("moe-latent-size: 4", "--moe-latent-size is not supported"),
    ],
)
def test_refused_files(file, text, message):
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        RunConfig.from_file(file)


def test_no_file(file):
    with pytest.raises(UserError, match="run.yaml cannot be read: .* No such file"):
        RunConfig.from_file(file)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--micro-batch-tokens 100", "give one of --micro-batch-size .* and --micro-batch-tokens"),
        ("--preference-epochs 0", "--preference-epochs is 0, expected at least 1"),
        ("--preference-epochs 1 --train-iters 2", "no effect with --train-iters"),
        ("--preference-epochs 1 --train-samples 2", "no effect with --train-samples"),
        ("--preference-valid-sources x", "-sources has no effect without --preference-valid-data"),
        ("--preference-valid-data x", "--preference-valid-sources is missing: .* log-probs of x"),
        ("--method sft", "--preference-sources has no effect with --method sft"),
        (
            "--method sft --pair-weights agreement --reference-check off",
            "--reference-check has no effect with --method sft, which has no reference",
        ),
        (
            "--method sft --pair-weights agreement --preference-valid-data x",
            "--preference-valid-sources is missing: .* log-probs of x",
        ),
        ("--train-iters 0", "--train-iters is 0, expected at least 1"),
        ("--train-samples -8", "--train-samples is -8, expected at least 1"),
        ("--global-batch-size 0", "--global-batch-size is 0, expected at least 1"),
        ("--micro-batch-size 0", "--micro-batch-size is 0, expected at least 1"),
        ("--seed -3", "--seed is -3, expected a whole number from 0 to 2147483647"),
        ("--seed 99999999999999999999", "--seed is 9+, expected a whole number from 0"),
        (
            "--reference-tolerance nan",
            "--reference-tolerance is nan, expected a number of at least",
        ),
        (
            "--reference-tolerance=-1",
            "--reference-tolerance is -1.0, expected a number of at least",
        ),
        ("--attention-backend foo", "--attention-backend: 'foo', expected one of flash, fused"),
        ("--cuda-graph-modules foo", "--cuda-graph-modules: 'foo', which it cannot be"),
        ("--lr-wsd-decay-iters 3", "have? no effect without --lr-decay-style WSD|has no effect"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_refused_words(more, message):
    with pytest.raises(UserError, match=message):
        made(*more.split())


def test_texts_stay_texts(file):
    """YAML would take these for 8, false and a date."""
    file.write_text(f"{FILE}\nsave: 010\nreference-check: off\ntensorboard-dir: 2026-07-01\n")
    words = ["--save", "010", "--reference-check", "off", "--tensorboard-dir", "2026-07-01"]
    assert RunConfig.from_file(file) == made(*words)


def test_one_file(file):
    with pytest.raises(UserError, match="--config is given twice, .*run.yaml and b.yaml: expected"):
        made("--config", str(file), "--config", "b.yaml")


def test_a_command_names_the_file(file):
    """Where it would print its usage for a word of the command line."""
    file.write_text("lr: much")
    with pytest.raises(UserError, match="run.yaml: argument --lr: invalid float value: 'much'"):
        run_command("train", ["--config", str(file)])
    assert make_parser("train")[1].exit_on_error and run_parser().exit_on_error


def test_attention_that_cannot_share_prompts():
    """Said once Transformer Engine is there."""
    config = made("--share-prompt", "--te-attention")
    with pytest.raises(UserError, match="leave out one of it and --te-attention"):
        rows_of(config, KINDS["te-attention"])
    assert not rows_of(made("--te-attention"), KINDS["te-attention"]).share_prompt
    with pytest.raises(UserError, match="--te-attention needs Transformer Engine's layers, but"):
        choose_kind(half=False, te_attention=True)


def test_what_is_missing():
    with pytest.raises(UserError, match="--preference-data is missing"):
        RunConfig.from_arguments([])
    sft = ["--method", "sft", "--preference-data", "pairs"]
    with pytest.raises(UserError, match="give one of --micro-batch-size"):
        RunConfig.from_arguments(sft)
    with pytest.raises(UserError, match="give --global-batch-size, in pairs"):
        RunConfig.from_arguments([*sft, "--micro-batch-size", "2"])
    with pytest.raises(UserError, match="--preference-sources is missing: .* log-probs of pairs"):
        RunConfig.from_arguments([*sft, "--pair-weights", "agreement"])
    with pytest.raises(UserError, match="--share-prompt has no effect"):
        RunConfig.from_arguments([*sft, "--share-prompt", *WORDS[-4:]])


def test_megatrons_arguments(setup, capsys):
    """The same each time that they are made, and nothing is written into the configuration."""
    sources = setup.sources("config", "{name: qwen, logprobs: qwen}")
    words = setup.flags(sources, "--save", str(setup.folder / "not-there"))
    words[words.index("--micro-batch-size")] = "--micro-batch-tokens"
    words[words.index("--micro-batch-tokens") + 1] = "4096"
    config, kind = RunConfig.from_arguments(words), KINDS["local"]
    start, datasets = find_start(Folders.read(config.flags)), open_datasets(config)
    first, second = (megatron_args(config, start, datasets, kind) for _ in range(2))
    assert vars(first) == vars(second) and vars(first) is not vars(second)
    assert config == RunConfig.from_arguments(words)
    run = Run.read(config, vars(first), rows_of(config, kind))
    assert run == Run.read(config, vars(second), rows_of(config, kind))
    assert (run.batch.pairs, run.schedule.steps, run.folders.loaded) == (8, 3, words[-1])
    assert run.batch.micro == first.micro_batch_size > 1 and first.load == words[-1]
    assert run.batch.rows.share_prompt and run.vocab_size == first.padded_vocab_size == 320
    assert not os.path.exists(words[-1])
