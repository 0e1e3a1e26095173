"""A tiny run of a method, whose curve is kept in tests/golden/."""

from pathlib import Path

from support.job_setup import Setup
from support.launcher import ROOT, Ranks

STEPS = 8


def curve(setup: Setup, ranks: Ranks, method: str) -> dict[str, list[float]]:
    """Train by a method from the tiny pivot; losses and norms of gradients, by step."""
    sources = setup.sources("golden", *(f"{{name: {n}, logprobs: {n}}}" for n in ("qwen", "phi")))
    steps = ["--train-iters", str(STEPS), "--lr", "2e-4", "--method", method]
    argv = setup.flags(sources, *steps)
    if method == "sft":
        position = argv.index("--preference-sources")
        del argv[position : position + 2]
    (record,) = ranks(1, "support.training:train", argv)
    return {"losses": [step["loss"] for step in record["steps"]], "norms": record["norms"]}


def path_of(method: str) -> Path:
    """Return where a method's curve is kept."""
    return ROOT / "tests" / "golden" / f"{method}.json"
