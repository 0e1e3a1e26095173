"""Adapters train as PEFT's do, and what is exported gives PEFT's logits."""

import pytest
import torch

from support import lora
from support.runs import LAYOUTS, steps_of

TRAIN = "support.training:train"
CASES = [
    ("llama", "tp1", "all-linear"),
    ("llama", "tp2-sp", "all-linear"),
    ("llama", "pp2", "all-linear"),
    ("phi3", "tp2", "all-linear"),
    ("qwen2", "tp2", "k_proj up_proj down_proj"),
    ("gemma3", "tp2-sp", "all-linear"),
]


def flags(setup, pivot, *more: str) -> list[str]:
    argv = setup.flags(setup.records, "--method", "sft", "--pretrained-checkpoint", str(pivot))
    argv += ["--global-batch-size", "20", "--micro-batch-size", "5", "--train-iters", "2", *more]
    argv.remove("--use-distributed-optimizer")
    position = argv.index("--preference-sources")
    return argv[:position] + argv[position + 2 :]


@pytest.mark.parametrize(("family", "layout", "targets"), CASES)
def test_gradients(setup, ranks, pivots, tmp_path, family, layout, targets):
    """The second step's, where neither A nor B is zero, of every adapter."""
    hf, pivot = pivots(family)
    world, more = LAYOUTS[layout]
    run = tmp_path / "run"
    more = [
        *more,
        *lora.PLAIN,
        "--tokenizer-check",
        "off",
        "--lora-rank",
        "4",
        "--lora-targets",
        *targets.split(),
    ]
    argv = flags(setup, pivot, *more, "--save", str(run), "--save-interval", "1")
    got = ranks(world, TRAIN, argv)
    for step in (1, 2):
        ranks(1, "support.lora:export", str(run), str(tmp_path / str(step)), step)
    model = lora.peft_model(hf, tmp_path / "1", trainable=True)
    loss, expected = lora.sft_gradients(model, setup.data)
    assert steps_of(got)[1]["loss"] == pytest.approx(loss, abs=1e-5)
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    assert got[0]["norms"][1] == pytest.approx(norm, rel=1e-4)
    before, after = lora.adapters(tmp_path / "1"), lora.adapters(tmp_path / "2")
    assert before.keys() == after.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-4, name
        found = (before[name] - after[name]) / lora.RATE
        assert (found - gradient).abs().max() < min(1e-5, 1e-3 * gradient.abs().max()), name
