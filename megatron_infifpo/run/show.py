"""A run in full: every field, with what it is where nobody says it."""

import json
import shlex
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from megatron_infifpo.recipes.job import flag_words
from megatron_infifpo.run.schema import Run, Training

DEFAULT = "# default"


def as_yaml(run: Run, *, defaults: bool = False) -> str:
    """Return a run.yaml of a run.

    Args:
        run: what it is.
        defaults: with every field that is not given, marked as a default.
    """
    return "\n".join(_lines(run, "", defaults)) + "\n"


def schema() -> str:
    """The JSON Schema of run.yaml, for editors."""
    return json.dumps(Run.model_json_schema(), indent=1) + "\n"


def as_shell(run: Run) -> str:
    """What examples/slurm/env.sh has of a run, as assignments of a shell."""
    trained = {one.method: one for one in run.train}
    sft = trained.get("sft")
    last = next((one for one in reversed(run.train) if one.method != "sft"), None)
    values = {
        "NODES": str(run.cluster.nodes), "RANKS": str(run.cluster.ranks or ""),
        "RUN": run.output, "PIVOT": run.pivot.model, "METHOD": last.method if last else "sft",
        "CONTAINER": run.cluster.container or "", "MOUNTS": run.cluster.mounts or "",
        "RETRIES": str(run.cluster.retries), "LAYOUT": _layout(last), "SFT": _options(sft),
        "TRAIN": _options(last), "PREPARE": _flags(run.pivot.prepare_flags),
        "INITIAL": _flags(run.pivot.flags),
    }  # fmt: skip
    return "".join(f': "${{{k}:={_quoted(v)}}}"\n' for k, v in values.items() if v)


def _quoted(text: str) -> str:
    """A text inside of "${NAME:=...}"."""
    return "".join(f"\\{c}" if c in '"$`\\}' else c for c in text)


def _layout(training: Training | None) -> str:
    if training is None or training.layout is None:
        return ""
    layout = training.layout
    sizes = ("tensor", "pipeline", "context", "expert")
    return " ".join(f"{name}={getattr(layout, name)}" for name in sizes)


def _options(training: Training | None) -> str:
    """NAME=VALUE words of a recipe."""
    if training is None:
        return ""
    words = []
    for name in ("epochs", "lr", "beta", "global_batch_size", "micro_batch_tokens", "seq_length"):
        if (value := getattr(training, name)) is not None:
            words.append(f"{name}={value}")
    return " ".join([*words, _flags(training.flags)]).strip()


def _flags(flags: dict[str, Any]) -> str:
    words = [w for n, v in flags.items() for w in flag_words(n.replace("_", "-"), v)]
    return shlex.quote(f"flags={shlex.join(words)}") if words else ""


def scalar(value: Any) -> str:
    """A value on one line, as YAML reads it."""
    if value is None:
        return "null"
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _lines(part: BaseModel, indent: str, defaults: bool) -> Iterator[str]:
    for name in type(part).model_fields:
        value, given = getattr(part, name), name in part.model_fields_set
        if not (given or defaults):
            continue
        note = "" if given else f"  {DEFAULT}"
        yield from field_lines(name, value, indent, note, defaults)


def field_lines(name: str, value: Any, indent: str, note: str, defaults: bool) -> Iterator[str]:
    """Lines of one field."""
    if isinstance(value, BaseModel):
        yield f"{indent}{name}:{note}"
        yield from _lines(value, indent + "  ", defaults)
    elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
        yield f"{indent}{name}:{note}"
        for each in value:
            first, *rest = _lines(each, "", defaults)
            yield f"{indent}  - {first}"
            yield from (f"{indent}    {line}" for line in rest)
    else:
        yield f"{indent}{name}: {scalar(value)}{note}"
