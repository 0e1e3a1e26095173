"""A tiny run of a method, whose curve is kept in tests/golden/."""

from pathlib import Path

from support.job_setup import Setup
from support.launcher import ROOT, Ranks

STEPS = 8


def curve(setup: Setup, ranks: Ranks, method: str) -> dict[str, list[float]]:
    """Train by a method from the tiny pivot; losses and norms of gradients, by step."""
    sources = [f"{{name: {name}, logprobs: {name}}}" for name in ("qwen", "phi")]
    steps = ["--train-iters", str(STEPS), "--lr", "2e-4"]
    argv = setup.method_flags(method, *steps, entries=sources)
    (record,) = ranks(1, "support.training:train", argv)
    return {"losses": [step["loss"] for step in record["steps"]], "norms": record["norms"]}


def path_of(method: str) -> Path:
    """Return where a method's curve is kept."""
    return ROOT / "tests" / "golden" / f"{method}.json"
