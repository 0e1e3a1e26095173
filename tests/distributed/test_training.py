"""Training at every layout: same losses, same gradients, same parameters."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.launcher import ROOT
from support.runs import BOTH, LAYOUTS, exported, steps_of


def distance(a: dict, b: dict) -> float:
    """Norm of the difference of two sets of parameters."""
    return math.sqrt(sum(float(((a[k] - b[k]).double() ** 2).sum()) for k in b))


@pytest.fixture(scope="module")
def runs(setup, ranks, tmp_path_factory):
    """Three InfiFPO steps at every layout."""
    sources = setup.sources("both", *BOTH)
    folder = tmp_path_factory.mktemp("layouts")
    results: dict[Any, Any] = {}
    for name, (world, flags) in LAYOUTS.items():
        save = ["--save", str(folder / name), "--save-interval", "3"]
        argv = setup.flags(sources, *flags, *save)
        results[name] = ranks(world, "support.training:train", argv)
        results[name, "parameters"] = exported(ranks, folder / name, folder / f"{name}-hf")
    return results


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_layouts_agree(runs, setup, layout):
    expected, got = steps_of(runs["tp1"]), steps_of(runs[layout])
    assert len(got) == 3
    assert set(got[0]) == set(expected[0])
    for step_expected, step_got in zip(expected, got, strict=True):
        for metric, value in step_expected.items():
            # At the start many rewards are 0 twice, and rounding breaks the tie.
            if metric == "rewards/accuracy" or metric.startswith("waste/"):
                continue
            assert step_got[metric] == pytest.approx(value, abs=1e-4), metric
    norms = [pytest.approx(norm, rel=1e-4) for norm in runs["tp1"][0]["norms"]]
    assert runs[layout][0]["norms"] == norms
    origin = load_file(setup.hf / "model.safetensors")
    a, b = runs[layout, "parameters"], runs["tp1", "parameters"]
    assert distance(a, b) / distance(b, dict.fromkeys(b, torch.zeros(()))) < 1e-4
    # Of what training did, too: Adam turns the rounding of a tiny gradient into a full step.
    assert distance(a, b) / distance(b, origin) < 1e-3


def test_first_loss_is_at_least_ln_2(runs):
    assert steps_of(runs["tp1"])[0]["loss"] >= math.log(2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pivot_as_its_own_reference(setup, ranks, layout):
    """Whatever the layout, the first loss is ln 2: training sees what the scorer saw."""
    world, flags = LAYOUTS[layout]
    sources = setup.sources("own", "{name: pivot, logprobs: initial}")
    results = ranks(
        world, "support.training:train", setup.flags(sources, *flags, "--train-iters", "1")
    )
    first = steps_of(results)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["clip-rate"] == 0.0
    assert first["share/pivot"] == 1.0


@pytest.mark.parametrize("layout", ["tp1", "tp2-pp2", "dp2"])
def test_dpo_starts_at_ln_2(setup, ranks, layout):
    world, flags = LAYOUTS[layout]
    sources = setup.sources("both", *BOTH)
    argv = setup.flags(sources, "--method", "dpo", "--train-iters", "1", *flags)
    assert steps_of(ranks(world, "support.training:train", argv))[0]["loss"] == pytest.approx(
        math.log(2), abs=1e-5
    )


@pytest.mark.parametrize("layout", ["dp2", "pp2", "pp2-vpp2"])
def test_overlapped_communication(setup, ranks, runs, layout):
    """Small buckets, so that the output layer's weight arrives on its own, while others compute.

    Evaluation between steps sees weights that have arrived, too.
    """
    sources, (_, flags) = setup.sources("both", *BOTH), LAYOUTS[layout]
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", "5000"]
    valid = ["--preference-valid-data", str(setup.data), "--preference-valid-sources", str(sources)]
    valid += ["--eval-interval", "1"]
    world = 2 if layout == "dp2" else 4  # two data-parallel ranks
    plain, overlapped = (
        ranks(world, "support.training:train", setup.flags(sources, *flags, *valid, *more))
        for more in ([], overlap)
    )
    expected = [step["loss"] for step in steps_of(runs["tp1"])]
    assert [step["loss"] for step in steps_of(overlapped)] == pytest.approx(expected, abs=1e-4)
    evaluations = [
        next(r["evaluations"] for r in reversed(run) if r["evaluations"][0])
        for run in (plain, overlapped)
    ]
    assert len(evaluations[0]) == len(evaluations[1]) >= 3
    for before, after in zip(*evaluations, strict=True):
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)


def test_bf16_stays_close(setup, ranks, runs):
    sources = setup.sources("both", *BOTH)
    argv = setup.flags(sources, "--bf16", "--tensor-model-parallel-size", "2")
    got, expected = steps_of(ranks(2, "support.training:train", argv)), steps_of(runs["tp1"])
    assert [s["loss"] for s in got] == pytest.approx([s["loss"] for s in expected], rel=0.05)


def test_metrics_reach_tensorboard(setup, ranks, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sources = setup.sources("both", *BOTH)
    flags = ["--tensorboard-dir", str(tmp_path), "--tensorboard-log-interval", "1"]
    steps = steps_of(ranks(1, "support.training:train", setup.flags(sources, *flags)))
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "rewards/accuracy", "logps/margin", "clip-rate", "share/qwen"):
        values = [event.value for event in events.Scalars(name)]
        assert values == pytest.approx([step[name] for step in steps], rel=1e-6)


def test_packing_changes_nothing(setup, ranks):
    """One pair a row, or all eight in one: the mean over pairs is the same."""
    sources = setup.sources("both", *BOTH)
    results = [
        ranks(1, "support.training:train", setup.flags(sources, "--micro-batch-size", size))
        for size in ("1", "8")
    ]
    a, b = (steps_of(result) for result in results)
    assert [s["loss"] for s in a] == pytest.approx([s["loss"] for s in b], abs=1e-5)
    assert results[0][0]["norms"] == pytest.approx(results[1][0]["norms"], rel=1e-4)


@pytest.mark.parametrize("budget, pairs", [("400", 2), ("10000", 8)])
def test_a_token_budget_sets_the_micro_batch(setup, ranks, runs, budget, pairs):
    sources = setup.sources("both", *BOTH)
    argv = setup.flags(sources, "--micro-batch-tokens", budget)
    del argv[argv.index("--micro-batch-size") : argv.index("--micro-batch-size") + 2]
    steps = steps_of(ranks(1, "support.training:train", argv))
    assert f"in micro-batches of {pairs}" in ranks.logs[0]
    expected = [step["loss"] for step in steps_of(runs["tp1"])]
    assert [step["loss"] for step in steps] == pytest.approx(expected, abs=1e-5)
    assert all(step["waste/imbalance"] == 0.0 for step in steps), "one rank waits for nobody"
    padded = steps_of(runs["tp2-sp"])
    assert all(0 <= step["waste/padding"] < 0.05 for step in padded)


def test_validation_covers_every_pair_once(setup, ranks):
    """20 pairs in steps of 8: the mean of the evaluation equals that of all pairs at once."""
    sources = setup.sources("both", *BOTH)
    valid = ["--preference-valid-data", str(setup.data), "--preference-valid-sources", str(sources)]
    small = ranks(
        1,
        "support.training:train",
        setup.flags(sources, *valid, "--train-iters", "1", "--lr", "0"),
    )
    large = ranks(
        1,
        "support.training:train",
        setup.flags(sources, "--global-batch-size", "20", "--train-iters", "1", "--lr", "0"),
    )
    evaluation, step = small[0]["evaluations"][0], steps_of(large)[0]
    for metric in ("loss", "logps/margin", "rewards/accuracy"):
        assert evaluation[metric] == pytest.approx(step[metric], abs=1e-5)


@pytest.mark.parametrize("layout", ["tp1", "tp2", "pp2", "cp2"])
def test_bf16_references_fit_bf16_training(setup, ranks, tmp_path, layout):
    """Scored and trained in the same precision and layout, the first loss is ln 2 as in float32."""
    world, flags = LAYOUTS[layout]
    score = ["--backend", "megatron", "--model", str(setup.pivot), "--input", str(setup.records)]
    ranks(
        world,
        "support.scoring:score",
        [*score, *flags, "--bf16", "--output", str(tmp_path / "pivot")],
    )
    sources = tmp_path / "sources.yaml"
    sources.write_text("initial: pivot\n")
    argv = setup.flags(sources, "--method", "dpo", "--bf16", "--train-iters", "1", *flags)
    first = steps_of(ranks(world, "support.training:train", argv))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_without_a_launcher(setup):
    """One rank needs no torchrun."""
    argv = setup.flags(setup.sources("both", *BOTH), "--train-iters", "1")
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_infifpo.train", *argv],
        cwd=ROOT, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "1 steps of 8" in done.stdout
