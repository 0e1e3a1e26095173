"""The examples' command lines: two stages and token-level fusion on tiny models, the ablation's
grid."""

import argparse
import importlib.util
import math
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import add_method_flags, method_from_options, resolve
from megatron_infifpo.records.records import read_records
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import SoftTargetStore
from support import tiny
from support.launcher import ROOT

DEMO = ROOT / "examples" / "demo"


def load(path: Path):
    """Import an example's main file under a name of its own."""
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def forked(monkeypatch, ranks):
    """Examples run their commands on forked ranks instead of starting Python each time."""
    monkeypatch.syspath_prepend(str(DEMO))
    import job

    def command(self, *words, ranks: int = 0, log=None, start=ranks):
        start(max(1, ranks), "support.tools:command", "megatron_infifpo", list(map(str, words)))

    def in_turn(self, *works):  # ranks that are forked here come one after the other
        for work in works:
            work(self)

    monkeypatch.setattr(job.Job, "command", command)
    monkeypatch.setattr(job.Job, "side_by_side", in_turn)


@pytest.mark.parametrize("gpus, ranks", [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_ranks(monkeypatch, tmp_path, gpus, ranks):
    """Two ranks share a CPU, but not a GPU."""
    monkeypatch.syspath_prepend(str(DEMO))
    import job

    monkeypatch.setattr(job, "count_gpus", lambda: gpus)
    started = []
    monkeypatch.setattr(
        job.Job, "command", lambda self, *words, ranks=0, log=None: started.append((ranks, words))
    )
    demo = job.Job(tmp_path, {"train": tmp_path / "train.jsonl"})
    demo.train("fused", "train", tmp_path / "pivot")
    demo.score("train", "pivot", tmp_path / "pivot")
    demo.score("train", "coder", tmp_path / "coder", "tensor")
    demo.score("train", "gemma", tmp_path / "gemma", "transformers")
    assert [count for count, _ in started] == [ranks, ranks, ranks, 0]
    sizes = [
        str(words[words.index(f"--{kind}-model-parallel-size") + 1])
        for (_, words), kind in zip(started, ("pipeline", "pipeline", "tensor"), strict=False)
    ]
    assert sizes == [str(ranks)] * 3


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_side_by_side(monkeypatch, tmp_path, gpus):
    """On a CPU two at a time, with one rank and one thread each; in turn where there are GPUs."""
    monkeypatch.syspath_prepend(str(DEMO))
    import job

    monkeypatch.setattr(job, "count_gpus", lambda: gpus)
    demo = job.Job(tmp_path, {})
    meeting, seen = threading.Barrier(1 if gpus else 2), []

    def work(of: job.Job) -> None:
        meeting.wait(timeout=30)  # for the other one
        seen.append((of.ranks, of.beside))

    demo.side_by_side(work, work)
    assert seen == [(1 if gpus < 2 else 2, gpus == 0)] * 2
    assert (demo.ranks, demo.beside) == (1 if gpus == 1 else 2, False)

    def fail(of: job.Job) -> None:
        raise UserError("a stage failed")

    with pytest.raises(UserError, match="a stage failed"):
        demo.side_by_side(fail)


def test_count_gpus(monkeypatch):
    """A hidden GPU does not count."""
    monkeypatch.syspath_prepend(str(DEMO))
    import job

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert job.count_gpus() == 0


def run(monkeypatch, example, *argv) -> None:
    monkeypatch.setattr(sys, "argv", [example.__name__, *map(str, argv)])
    example.main()


def test_two_stages(forked, monkeypatch, tmp_path, capfd):
    tiny.save_model(tmp_path / "pivot-hf", "llama", seed=1)
    for seed, (name, family) in enumerate({"qwen": "qwen2", "phi": "phi3"}.items()):
        tiny.save_model(tmp_path / name, family, vocab_size=290, seed=seed + 2)
    tiny.write_records(tmp_path / "all.jsonl", 40)
    tiny.write_records(tmp_path / "heldout.jsonl", 12, seed=5)
    example = load(ROOT / "examples" / "two_stage" / "run.py")
    flags = "--lr 1e-3 --global-batch-size 8 --micro-batch-size 2 --seq-length 256 "
    flags += "--lr-decay-style constant --log-interval 1"
    argv = [
        "--output", tmp_path / "out", "--pivot", tmp_path / "pivot-hf",
        "--records", tmp_path / "all.jsonl", "--heldout", tmp_path / "heldout.jsonl",
        "--source", f"qwen={tmp_path}/qwen", "--source", f"phi={tmp_path}/phi:code",
        "--sft-flags", flags, "--flags", flags,
    ]  # fmt: skip
    run(monkeypatch, example, *argv)
    halves = [read_records(tmp_path / "out" / f"{name}.jsonl") for name in ("sft", "preference")]
    assert sum(map(len, halves)) == 40
    assert not {r.id for r in halves[0]} & {r.id for r in halves[1]}
    steps = (tmp_path / "out" / "sft" / "latest_checkpointed_iteration.txt").read_text()
    assert int(steps) == 3 * len(halves[0]) // 8, "three epochs"
    logprobs = tmp_path / "out" / "logprobs"
    scored = LogprobStore(logprobs / "preference-sft").manifest["weights_sha256"]
    assert scored != LogprobStore(logprobs / "heldout-pivot").manifest["weights_sha256"]
    assert (tmp_path / "out" / "infifpo-hf" / "model.safetensors").exists()
    table = capfd.readouterr().out
    assert all(row in table for row in ("pivot", "after SFT", "after InfiFPO"))
    monkeypatch.setattr("job.Job.command", None)  # everything is skipped
    run(monkeypatch, example, *argv)
    rows, again = (
        [line for line in text.split("held-out pairs")[1].splitlines() if "%" in line]
        for text in (table, capfd.readouterr().out)
    )
    assert again == rows and len(rows) >= 3
    with pytest.raises(UserError, match="infifpo .* was made with other flags"):
        run(monkeypatch, example, *argv[:-1], flags + " --seed 7")


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--source", "qwen"], "expected NAME=DIR"),
        (["--source", "sft=hf"], "the name sft is taken"),
    ],
)
def test_two_stage_bad_input(forked, monkeypatch, tmp_path, argv, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    example = load(ROOT / "examples" / "two_stage" / "run.py")
    with pytest.raises(UserError, match=expected):
        given = ("--pivot", "x", "--records", "x", "--heldout", "x")
        run(monkeypatch, example, "--output", tmp_path / "out", *given, *argv)


def test_ablation_grid(monkeypatch):
    """Every row is a method of its own, and as the paper has it."""
    monkeypatch.syspath_prepend(str(DEMO))
    example = load(ROOT / "examples" / "ablation" / "run.py")
    parser = argparse.ArgumentParser()
    add_method_flags(parser)
    methods = {
        name: method_from_options("infifpo", vars(parser.parse_args(flags)))
        for name, (_, flags) in example.VARIANTS.items()
    }
    assert len(set(methods.values())) == len(methods)
    assert methods["infifpo"] == resolve("infifpo")
    assert methods["neither"] == resolve("fpo")
    assert methods["dpo"] == resolve("dpo", length_normalization=True)


def on_tiny_models(monkeypatch, setup, records: dict[str, Path] | None = None) -> None:
    """Let the examples take tiny models, and other records than the demo's."""
    import stages

    records = records or {"train": setup.records, "heldout": setup.records}
    monkeypatch.setattr(stages, "write_records", lambda folder: records)
    small = "--lr 1e-3 --global-batch-size 8 --micro-batch-size 2 --seq-length 256 --log-interval 1"
    monkeypatch.setattr(stages, "TRAIN", [*small.split(), "--train-iters", "2"])
    models = {name: (setup.folder / name, "tensor") for name in ("qwen", "phi")}
    prepared = stages.Prepared(setup.hf, setup.pivot, models)
    monkeypatch.setattr(stages, "models", lambda job: prepared)


def test_demo(forked, monkeypatch, setup, capfd):
    """All of it on tiny models: every row is a model of its own, from the same start."""
    import island

    example = load(DEMO / "run.py")
    folder = setup.folder / "demo"
    on_tiny_models(monkeypatch, setup, island.write_records(folder / "records"))
    run(monkeypatch, example, "--output", folder)
    shown = capfd.readouterr().out.split("held-out pairs")[-1]
    rows = [line[:29].strip() for line in shown.splitlines() if "%" in line][:7]
    expected = ["qwen, a source", "phi, a source", "pivot", "SFT, the start of all below"]
    assert rows == [*expected, "more SFT", "DPO", "InfiFPO"]
    names = ("qwen", "phi", "pivot", "sft", "more-sft", "dpo", "fused")
    stores = [LogprobStore(folder / "logprobs" / f"heldout-{name}") for name in names]
    assert len({store.manifest["weights_sha256"] for store in stores}) == len(names)
    for name in example.METHODS:
        words = (folder / "commands" / name).read_text().split()
        assert words[words.index("--pretrained-checkpoint") + 1] == str(folder / "sft")
        assert words[words.index("--preference-data") + 1] == str(folder / "data" / "preference")
    # Of pairs whose reference is the policy itself, the first step pulls at all alike.
    pulls = dict(re.findall(r"^  (\S.*?)  +([\d. ]+)$", shown.split("pull of")[1], re.M))
    assert pulls["DPO"].split() == ["0.50", "0.50", "0.50"]
    assert pulls["InfiFPO"].split()[:2] > ["0.50", "0.50"] and len(pulls) == 4
    assert (folder / "fused" / "report.html").exists()


def test_differences(monkeypatch, tmp_path, capsys):
    """The interval is over facts: two pairs of one fact that agree count once."""
    monkeypatch.syspath_prepend(str(DEMO))
    import island
    import table

    records = island.write_records(tmp_path)
    facts = np.array([fact for fact, _ in island.truth(records["heldout"])])
    gained = {"fused": facts % 4 != 0, "dpo": facts % 2 == 0}  # 75 % and 50 %
    means = {
        name: torch.tensor(np.stack([right, ~right], axis=1), dtype=torch.float64)
        for name, right in gained.items()
    }
    monkeypatch.setattr(table, "LogprobStore", lambda path: path.name.removeprefix("heldout-"))
    monkeypatch.setattr(table, "mean_logps", means.__getitem__)
    job: Any = SimpleNamespace(folder=tmp_path, records=records)
    table.print_differences(job, "fused", {"DPO": "dpo"})
    gain, low, high = map(float, re.findall(r"[+-]\d+\.\d", capsys.readouterr().out))
    assert gain == 25
    deviation = 100 * math.sqrt((0.5 + 0.25 - 0.25**2) / 24)  # of the mean over facts
    assert low == pytest.approx(gain - 1.96 * deviation, abs=4)
    assert high == pytest.approx(gain + 1.96 * deviation, abs=4)


def test_ablation_rows(forked, monkeypatch, setup, capfd):
    """Two rows on tiny models: only their flags and sources differ, and both are in the table."""
    example = load(ROOT / "examples" / "ablation" / "run.py")
    on_tiny_models(monkeypatch, setup)
    folder = setup.folder / "ablation"
    run(monkeypatch, example, "--output", folder, "--only", "unclipped", "sources-1")
    table = capfd.readouterr().out.split("held-out pairs")[-1].splitlines()
    labels = [line[:24].strip() for line in table if "%" in line]
    assert labels == ["SFT, the start", "without clipping", "1 of 2 sources: qwen"]
    rows = ("unclipped", "sources-1")
    a, b = ((folder / "commands" / f"ablation-{row}").read_text().split() for row in rows)
    assert set(a) - set(b) - {"--no-clip"} == {w for w in a if "unclipped" in w or "qwen-phi" in w}
    assert set(b) - set(a) == {w for w in b if "sources-1" in w or "sft-qwen" in w}
    with pytest.raises(UserError, match="--only has best, expected infifpo, sums"):
        run(monkeypatch, example, "--output", folder, "--only", "best")


def test_baselines(forked, monkeypatch, setup, capfd):
    """Soft targets, a model for each source, and merging, on tiny models; then all is skipped."""
    example = load(ROOT / "examples" / "baselines" / "run.py")
    on_tiny_models(monkeypatch, setup)
    folder = setup.folder / "baselines"
    argv = ["--output", folder, "--only", "infifusion", "fusechat"]
    run(monkeypatch, example, *argv)
    table = capfd.readouterr().out.split("held-out pairs")[-1].splitlines()
    rows = ["SFT, the start", "InfiFusion", "FuseChat"]
    assert [line[:16].strip() for line in table if "%" in line] == rows
    sources = {
        name: SoftTargetStore(folder / "targets" / name).sources
        for name in ("infifusion", "fusechat-qwen", "fusechat-phi")
    }
    assert sources == {
        "infifusion": ("qwen", "phi"),
        "fusechat-qwen": ("qwen", "initial"),
        "fusechat-phi": ("phi", "initial"),
    }
    rows = ["sft", "baselines-infifusion", "baselines-fusechat"]
    scored = {
        LogprobStore(folder / "logprobs" / f"heldout-{row}").manifest["weights_sha256"]
        for row in rows
    }
    assert len(scored) == 3
    monkeypatch.setattr("job.Job.command", None)  # everything is skipped
    run(monkeypatch, example, *argv)
    again = capfd.readouterr().out.split("held-out pairs")[-1].splitlines()
    assert again == table
