"""docs/fewer-gpus.md and examples/long say what the planner says."""

import contextlib
import io
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.planning.estimate import estimate
from megatron_infifpo.planning.fit import MEASURES, Fitted, fit
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.models import planned_model
from megatron_infifpo.planning.plan import GIB
from megatron_infifpo.planning.recompute import FULL, NONE
from support.launcher import ROOT
from support.tools import run_command

PAGE = (ROOT / "docs/fewer-gpus.md").read_text(encoding="utf-8")
LONG = (ROOT / "examples/long/README.md").read_text(encoding="utf-8")
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
    *(("qwen3-30b-a3b", gpus, ADAPTERS) for gpus in (4, 2, 1)),
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


def blocks(page: str) -> Iterator[list[str]]:
    """Indented blocks of a page that begin with a command of the planner."""
    lines: list[str] = []
    for line in [*page.splitlines(), "end"]:
        if line.startswith("    ") or (lines and not line):
            lines.append(line[4:])
            continue
        if lines and lines[0].startswith("infifpo plan"):
            yield lines
        lines = []


BLOCKS = [*blocks(PAGE), *blocks(LONG)]


@pytest.mark.parametrize("lines", BLOCKS, ids=lambda lines: lines[0])
def test_output(lines):
    """What is shown of a command is what it prints."""
    assert len(BLOCKS) == 4 and len(lines) > 1
    printed, words = io.StringIO(), shlex.split(lines[0])
    with contextlib.redirect_stdout(printed):
        try:
            run_command(*words[1:])
        except UserError as error:
            print(f"error: {error}")
    shown = [line for line in lines[1:] if line]
    assert shown == printed.getvalue().splitlines()


LIGHTER: list[tuple[str, dict[str, Any]]] = [
    ("--grad-reduce-in-bf16", {"grad_reduce_in_bf16": True}),
    ("--adam-moments bf16", {"adam_moments": "bf16"}),
    ("--optimizer-offload 1", {"optimizer_offload": 1.0}),
]


@pytest.mark.parametrize(("flag", "options"), [("", {}), *LIGHTER])
def test_long_reasoning(flag, options):
    """What fits where responses are longer than prompts: a row of the table in examples/long."""
    options = options | {"seq_length": 131_072, "prompt_tokens": 4000, "response_tokens": 28_000}
    one = estimate(PlanningJob(planned_model("phi-4"), 8, **options))[0]
    assert one.fits == bool(flag)
    if flag:
        assert one.recompute == FULL
        row = f"| `{flag}` | TP {one.layout.tensor}, CP {one.layout.context} |"
        row += f" {one.memory.total / GIB:.1f} | {one.host / GIB:.0f} |"
        assert one.layout.pipeline == 1 and row in LONG.splitlines()


def test_long_commands():
    """The page trains with the flags that the plan prints first."""
    flags = next(line.split() for line in BLOCKS[-1] if line.startswith("    --"))
    trained = [part.split("\n\n")[0] for part in LONG.split("-m megatron_infifpo train ")[1:]]
    assert len(trained) == 2
    for command in trained:
        assert " ".join(flags) in " ".join(command.replace("\\", " ").split())
