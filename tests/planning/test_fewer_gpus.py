"""docs/fewer-gpus.md says what the planner says."""

import contextlib
import io
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.planning.fit import MEASURES, Fitted, fit
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.models import planned_model
from megatron_infifpo.planning.plan import GIB
from megatron_infifpo.planning.recompute import NONE
from support.launcher import ROOT
from support.tools import run_command

PAGE = (ROOT / "docs/fewer-gpus.md").read_text(encoding="utf-8")
NAMES = {
    "phi-4": "Phi-4, 14B",
    "mistral-small-24b": "Mistral-Small, 24B",
    "llama-3.3-70b": "Llama-3.3, 70B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
}
ADAPTERS = {"lora_rank": 16}
RECIPES: list[tuple[str, int, dict[str, Any]]] = [
    *((name, gpus, {}) for name in list(NAMES)[:3] for gpus in (16, 8, 4)),
    ("phi-4", 2, {}),
    *((name, gpus, ADAPTERS) for name in list(NAMES)[:3] for gpus in (8, 4)),
    ("phi-4", 1, ADAPTERS),
    ("mistral-small-24b", 2, ADAPTERS),
    ("qwen3-30b-a3b", 8, {}),
    ("qwen3-30b-a3b", 8, {"measures": MEASURES}),
    ("qwen3-30b-a3b", 16, {}),
]


def row(name: str, gpus: int, **options: Any) -> str:
    """A row of the page's table."""
    measures = {"measures": options.pop("measures")} if "measures" in options else {}
    trained = f"LoRA, rank {options['lora_rank']}" if options else "all"
    head = f"| {NAMES[name]} | {trained} | {gpus} |"
    try:
        found = fit(PlanningJob(planned_model(name), gpus, **options), **measures)
    except UserError:
        return f"{head} does not fit | | | | | | | | |"
    memory, spent = found.memory, found.spent
    parts = (memory.weights, memory.gradients, memory.optimizer, memory.activations)
    again = (spent.recomputing, spent.updating, spent.exchanging, spent.waiting)
    return (
        f"{head} {layout(found.layout)} | {taken(found)} | "
        f"{', '.join(f'{part / GIB:.1f}' for part in parts)} | {memory.total / GIB:.1f} | "
        f"{found.host / GIB:.0f} | {found.hours:.1f} | "
        f"{', '.join(f'{part:.1f}' for part in again)} |"
    )


def layout(one: Layout) -> str:
    sizes = {"TP": one.tensor, "PP": one.pipeline, "DP": one.data, "EP": one.expert}
    return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)


def taken(found: Fitted) -> str:
    """What makes memory go further."""
    job = found.job
    words = {
        f"recompute {found.recompute}": found.recompute != NONE,
        "16 bits": job.precision_aware,
        f"offload {job.optimizer_offload:g}": job.optimizer_offload,
        "bf16 moments": job.adam_moments == "bf16",
    }
    return ", ".join(word for word, used in words.items() if used)


@pytest.mark.parametrize(("name", "gpus", "options"), RECIPES)
def test_rows(name, gpus, options):
    assert row(name, gpus, **options) in PAGE.splitlines()


def blocks() -> Iterator[list[str]]:
    """Indented blocks of the page that begin with a command of the planner."""
    lines: list[str] = []
    for line in [*PAGE.splitlines(), "end"]:
        if line.startswith("    ") or (lines and not line):
            lines.append(line[4:])
            continue
        if lines and lines[0].startswith("infifpo plan"):
            yield lines
        lines = []


@pytest.mark.parametrize("lines", list(blocks()), ids=lambda lines: lines[0])
def test_output(lines):
    """What is shown of a command is what it prints."""
    printed, words = io.StringIO(), shlex.split(lines[0])
    with contextlib.redirect_stdout(printed):
        try:
            run_command(*words[1:])
        except UserError as error:
            print(f"error: {error}")
    shown = [line for line in lines[1:] if line]
    assert shown == printed.getvalue().splitlines()
