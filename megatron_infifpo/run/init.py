"""Write a run.yaml with everything that it can say: what is not given, as a comment."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_infifpo.errors import UserError
from megatron_infifpo.run.reading import part_of
from megatron_infifpo.run.schema import Run
from megatron_infifpo.run.show import scalar

WIDTH = 100
HEAD = """\
# What this run is: infifpo fuse {name} makes it, and goes on where it was interrupted.
# What is commented out is as it is without it. Paths are relative to where the command is run.
# infifpo show {name} checks this file; infifpo show --schema writes a schema for editors.
"""
TRAIN = [
    {"method": "sft", "epochs": 3, "lr": "1e-6"},
    {"method": "infifpo", "epochs": 1, "lr": "1e-7"},
]
"""The paper's run, to be edited."""


def commented(content: dict[str, Any], name: str) -> str:
    """Return a run.yaml.

    Args:
        content: what is given.
        name: of the file.
    """
    content = content | {"train": TRAIN}
    lines = [line for field in Run.model_fields for line in ("", *_field(Run, field, content, ""))]
    return HEAD.format(name=name) + "\n".join(lines) + "\n"


def _field(part: type[BaseModel], name: str, content: dict[str, Any], indent: str) -> Iterator[str]:
    """Lines of a field: what is given, or as a comment what is so without it."""
    field = part.model_fields[name]
    inner = part_of(field.annotation)
    what = " ".join((field.description or (inner.__doc__ if inner else "") or "").split())
    if not indent:
        yield from textwrap.wrap(what, WIDTH, initial_indent="# ", subsequent_indent="# ")
    if name not in content and inner is None:
        yield _with_comment(f"{indent}# {name}: {_usual(field)}", what if indent else "")
    elif name not in content:
        yield _with_comment(f"{indent}# {name}:", what if indent else "")
        if not indent:
            yield from (f"# {line.replace('# ', '', 1)}" for line in _fields(inner, {}, "  "))
    elif inner is None:
        yield f"{indent}{name}: {_value(content[name])}"
    elif isinstance(content[name], list):
        yield f"{indent}{name}:"
        for number, each in enumerate(content[name]):
            given = [f"{key}: {_value(value)}" for key, value in each.items()]
            yield f"{indent}  - {given[0]}"
            yield from (f"{indent}    {line}" for line in given[1:])
            if number == len(content[name]) - 1:  # once is enough
                rest = (each for each in inner.model_fields if each not in content[name][number])
                for key in rest:
                    yield from _field(inner, key, {}, f"{indent}    ")
    else:
        yield f"{indent}{name}:"
        yield from _fields(inner, content[name], f"{indent}  ")


def _fields(part: Any, content: dict[str, Any], indent: str) -> Iterator[str]:
    for name in part.model_fields:
        yield from _field(part, name, content, indent)


def _usual(field: FieldInfo) -> str:
    return "" if field.is_required() else scalar(field.get_default(call_default_factory=True))


def _value(value: Any) -> str:
    """As it is written: a number that is given as text stays as that text."""
    return value if isinstance(value, str) and value[:1].isdigit() else scalar(value)


def _with_comment(line: str, what: str) -> str:
    return f"{line:<40}  # {what}".rstrip(" #") if what else line


def ask(question: str, *, several: bool = False) -> list[str]:
    """Ask on a terminal until there is an answer; an empty line ends several.

    Raises:
        UserError: the terminal is closed.
    """
    found: list[str] = []
    while True:
        try:
            answer = input(
                f"{question}{' (empty: no more)' if several and found else ''}: "
            ).strip()
        except EOFError:
            raise UserError("no answer: give flags in place of answers, see --help") from None
        if answer:
            found.append(answer)
        if found and not (several and answer):
            return found
        if several and not answer:
            return found


def write_new(path: Path, text: str) -> None:
    """Write a file that is not there.

    Raises:
        UserError: it is.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{path} is there already: choose another name, or delete it") from None
