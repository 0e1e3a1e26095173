"""Read run.yaml: whatever is wrong in it is said with file and line, and the nearest right name."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from megatron_infifpo.errors import UserError
from megatron_infifpo.run.checks import wrong_in
from megatron_infifpo.run.schema import Run
from megatron_infifpo.storage.yaml_files import lines_of, read_yaml

Place = tuple[str | int, ...]
"""Where in the file: names, and numbers in lists."""
# What is JSON inside: there 512 is a number. Everywhere else a flag is the text that it is.
_JSON = ("chat_template_options", "chat-template-options")
SHOWN = 8  # mistakes that are told of at once


def read_run(path: str | Path) -> Run:
    """Read and check a run.yaml.

    Args:
        path: the file; what it names is relative to where the program runs, as in every flag.

    Raises:
        UserError: it cannot be read, or is wrong; says where, and of several mistakes each.
    """
    path = Path(path)
    try:
        content = _typed(read_yaml(path, texts=True), read_yaml(path))
        lines = lines_of(path)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}), expected a run.yaml: infifpo init writes one"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not valid YAML ({reason})") from None
    return make_run(content, str(path), lines)


def make_run(content: Any, name: str, lines: Mapping[Place, int] | None = None) -> Run:
    """Check what a run.yaml holds.

    Args:
        content: of the file.
        name: of the file, for messages.
        lines: of every place in it; None where it is no file.

    Raises:
        UserError: as `read_run`.
    """
    if not isinstance(content, dict):
        raise UserError(f"{name} holds no run, expected output, pivot, sources, data, ...")
    try:
        run = Run.model_validate(content)
        found = list(wrong_in(run))
    except ValidationError as error:
        found = [_sentence(dict(each), content) for each in error.errors(include_url=False)]
    if not found:
        return run
    said = [f"{_where(place, name, lines)}: {text}" for place, text in found[:SHOWN]]
    more = len(found) - SHOWN
    raise UserError("\n".join(said + [f"and {more} more"] * (more > 0)))


def _typed(text: Any, value: Any, name: str = "") -> Any:
    """Take values as texts, but what becomes JSON as YAML types it."""
    if name in _JSON:
        return value
    if isinstance(text, dict) and isinstance(value, dict):
        pairs = zip(text.items(), value.values(), strict=True)
        return {key: _typed(inner, typed, str(key)) for (key, inner), typed in pairs}
    if isinstance(text, list) and isinstance(value, list):
        return [_typed(a, b, name) for a, b in zip(text, value, strict=True)]
    return text


def _where(place: Place, name: str, lines: Mapping[Place, int] | None) -> str:
    """File and line of a place; the file alone where there are no lines."""
    return name if lines is None else f"{name}:{nearest(place, lines)}"


def nearest(place: Place, lines: Mapping[Place, int]) -> int:
    """The line of a place, or of the nearest one around it that is in the file."""
    while place and place not in lines:
        place = place[:-1]
    return lines[place]


def _sentence(error: dict[str, Any], content: Any) -> tuple[Place, str]:
    """Return where a mistake of pydantic's is, and what it is."""
    place, kind = tuple(error["loc"]), error["type"]
    # Where several types are possible it names each of them as a place.
    while place and not _inside(content, place) and kind != "missing":
        place = place[:-1]
    path = written(place)
    if kind == "missing":
        return place, f"{path} is missing"
    if kind == "extra_forbidden":
        known = list(_fields_at(place[:-1]))
        near = difflib.get_close_matches(str(place[-1]), known, 1, 0.5)
        expected = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return place, f"{path} is no field, {expected}"
    message = error["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = _at(content, place)
    given = "" if isinstance(value, dict | list) else f" is {value!r}"
    return place, f"{path}{given}: {message}".removeprefix(": ")


def written(place: Sequence[str | int]) -> str:
    """A place as a person writes it: train[1].lr."""
    text = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in place)
    return text.removeprefix(".")


def _at(content: Any, place: Place) -> Any:
    for each in place:
        content = content[each]
    return content


def _inside(content: Any, place: Place) -> bool:
    try:
        _at(content, place)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _fields_at(place: Place) -> Iterator[str]:
    """Names of the fields that the part at a place has."""
    part: type[BaseModel] = Run
    for each in place:
        if isinstance(each, str):
            part = part_of(part.model_fields[each].annotation) or part
    yield from part.model_fields


def part_of(annotation: Any) -> type[BaseModel] | None:
    """The part of a run that an annotation names, in a list or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(part_of, get_args(annotation))), None)
