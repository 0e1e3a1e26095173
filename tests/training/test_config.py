"""A run's configuration: of words or of a file, checked once, and Megatron's arguments of it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.engine.layer_kind import KINDS
from megatron_infifpo.errors import UserError
from megatron_infifpo.training.config import RunConfig
from megatron_infifpo.training.data import open_datasets
from megatron_infifpo.training.megatron_args import megatron_args, rows_of
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import Folders, find_start

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
        ("zzzzzz: 1", "zzzzzz is no flag of a run, expected those of infifpo train --help"),
        ("environment: true", "environment is no flag"),
        ("config: others.yaml", "config is no flag"),
        ("bf16: 3", "bf16 is 3, expected true or false: the flag takes no value"),
        ("lr: true", "lr is True, expected a value"),
        ("lr: [1, 2]", "lr is .1, 2., expected a value"),
        ("profile-ranks: {a: 1}", "profile-ranks is .*, expected a list"),
        ("lr: much", "argument --lr: invalid float value: 'much'"),
        ("tokenizer-check: 'no'", "argument --tokenizer-check: invalid choice: 'no'"),
        ("- lr", "run.yaml holds no flags: expected `name: value`, one a line"),
        ("lr: [", "run.yaml cannot be read: while parsing"),
        ("num-experts: 4", "--num-experts is not supported"),
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
        ("--share-prompt --te-attention", "leave out one of it and --te-attention"),
        ("--lr-wsd-decay-iters 3", "have? no effect without --lr-decay-style WSD|has no effect"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_refused_words(more, message):
    with pytest.raises(UserError, match=message):
        made(*more.split())


def test_what_is_missing():
    with pytest.raises(UserError, match="--preference-data is missing"):
        RunConfig.from_arguments([])
    sft = ["--method", "sft", "--preference-data", "pairs"]
    with pytest.raises(UserError, match="give one of --micro-batch-size"):
        RunConfig.from_arguments(sft)
    with pytest.raises(UserError, match="give --global-batch-size, in pairs"):
        RunConfig.from_arguments([*sft, "--micro-batch-size", "2"])
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
