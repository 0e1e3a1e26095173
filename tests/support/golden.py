"""A tiny run of a method, whose curve is kept in tests/golden/."""

from pathlib import Path

from support.job_setup import Setup
from support.launcher import ROOT, Ranks

STEPS = 8
# An L1 distance goes by the signs of differences, many of which are tiny between random models:
# after larger steps each kind of processor goes its own way.
SLOWER = {"infifusion": "1e-5"}


def curve(setup: Setup, ranks: Ranks, method: str) -> dict[str, list[float]]:
    """Train by a method from the tiny pivot; losses and norms of gradients, by step."""
    sources = [f"{{name: {name}, logprobs: {name}}}" for name in ("qwen", "phi")]
    steps = ["--train-iters", str(STEPS), "--lr", SLOWER.get(method, "2e-4")]
    argv = setup.method_flags(method, *steps, entries=sources)
    (record,) = ranks(1, "support.training:train", argv)
    return {"losses": [step["loss"] for step in record["steps"]], "norms": record["norms"]}


def path_of(method: str) -> Path:
    """Return where a method's curve is kept."""
    return ROOT / "tests" / "golden" / f"{method}.json"
