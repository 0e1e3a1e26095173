"""Options of a stage and of an executor, as words of a command line: NAME=VALUE."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.commands import BASELINES, STAGES
from megatron_infifpo.recipes.job import split_words

SEVERAL = {
    "baselines": "Train by every other method: " + ", ".join(BASELINES) + ".",
    "pipeline": "All stages: convert, prepare, sft, score, infifpo, export.",
    "fusion": "Token-level fusion of the SFT half: score, then fuse, sft, export by three methods.",
}

# Whose options they take, and which of them they give themselves.
_OPTIONS_OF = {"baselines": "infifpo", "pipeline": "infifpo", "fusion": "sft"}
_GIVEN = {
    "baselines": ("method", "index"),
    "pipeline": ("initial", "index"),
    "fusion": ("method", "index", "beta", "initial"),
}


def spread(words: Sequence[str]) -> list[str]:
    """Put the words of every --options=WORDS in its place: what is given twice, counts last.

    Raises:
        UserError: a quote that is not closed.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        if name == "--options":
            found += split_words(text if equals else next(rest, ""), name)
        else:
            found.append(word)
    return found


def read_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE as the stage's parameters have them.

    Raises:
        UserError: not of that form, unknown, or of another type.
    """
    stage = STAGES[_OPTIONS_OF.get(name, name)]
    known = dict(inspect.signature(stage).parameters)
    for given in _GIVEN.get(name, ()):
        del known[given]
    if name in ("pipeline", "fusion"):
        known["hf"] = inspect.signature(STAGES["convert"]).parameters["hf"]
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise UserError(f"{text}: expected NAME=VALUE, NAME one of {', '.join(known)}")
        found[key] = read_value(
            text, value, known[key].annotation, least=0 if key == "index" else 1
        )
    return found


def read_site_options(
    name: str, texts: Sequence[str], executor: Callable[..., Any] | None
) -> dict[str, Any]:
    """Read EXECUTOR.NAME=VALUE; numbers where the executor's parameter is one.

    Args:
        name: of the executor.
        texts: the options.
        executor: makes it; None where only the site knows it.

    Raises:
        UserError: of another executor, or not a number.
    """
    known = inspect.signature(executor).parameters if executor else {}
    found: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        prefix, _, key = path.partition(".")
        if prefix != name or not equals:
            raise UserError(f"{text}: expected {name}.NAME=VALUE")
        digits = int(value) if value.isdigit() else value  # where nobody says what it is
        kind = known[key].annotation if key in known else None
        found[key] = read_value(text, value, kind, least=0) if kind else digits
    return found


def read_value(text: str, value: str, kind: Any, *, least: int = 1) -> Any:
    """Read VALUE of the option NAME=VALUE.

    Args:
        text: the option, for messages.
        value: what it is given.
        kind: annotation of the parameter.
        least: the smallest whole number that makes sense.

    Raises:
        UserError: it is not of that kind.
    """
    if kind in (str, str | None):
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"{text}: expected true or false")
        return value.lower() == "true"
    if kind in (float | None, int | None) and value in ("", "None"):
        return None
    whole = kind in (int, int | None)
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        number = -math.inf
    if whole and number < least:
        raise UserError(f"{text}: expected a whole number of at least {least}")
    if not (whole or 0 < number < math.inf):  # NaN is neither
        raise UserError(f"{text}: expected a number above 0")
    return number
