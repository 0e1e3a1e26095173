"""How flags' values are read, and checked in the jobs that have them as fields."""

import argparse
import contextlib
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError


def positive(text: str) -> int:
    """Read a flag's value that must be a whole number above 0."""
    return whole(1)(text)


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """Make a reader of a flag's value: a whole number, `least` to `most`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if least <= int(text) <= most:
                return int(text)
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected a whole number of at least {least}, {most} at most"
        )

    return read


def real(least: float, most: float = math.inf) -> Callable[[str], float]:
    """Make a reader of a flag's value: a finite number, `least` to `most`."""

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(float(text)) and least <= float(text) <= most:
                return float(text)
        high = "" if math.isinf(most) else f", {most:g} at most"
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least {least:g}{high}")

    return read


def flag(field: str) -> str:
    """Spelling of a job's field, or of a method's option, on the command line."""
    return "--" + field.replace("_", "-")


def check_choice(field: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a field of a job that is none of its choices.

    Raises:
        UserError: it is not.
    """
    if value not in choices:
        raise UserError(f"{flag(field)} is {value!r}, expected one of {', '.join(choices)}")


# What a field may be, and how it is said, by its declared type. A text may be a path as well.
_KINDS: dict[Any, tuple[type | tuple[type, ...], str]] = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: (numbers.Real, "a number"),
    str: ((str, os.PathLike), "a text"),
    Path: (Path, "a Path"),
    Sequence: (Collection, "a list"),
    Mapping: (Mapping, "a mapping"),
    types.NoneType: (types.NoneType, "None"),
}


def check_types(job: Any) -> None:
    """Refuse a job with a field of another type than its class declares.

    Raises:
        UserError: there is one; a text is no list, and True is no number.
    """
    for name, hint in typing.get_type_hints(type(job)).items():
        value, several = getattr(job, name), isinstance(hint, types.UnionType)
        kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(hint) if several]
        kinds = kinds or [typing.get_origin(hint) or hint]
        if not any(_fits(value, kind) for kind in kinds):
            words = " or ".join(_KINDS[k][1] if k in _KINDS else k.__name__ for k in kinds)
            raise UserError(f"{flag(name)} is {value!r}, expected {words}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a declared type."""
    if isinstance(value, bool) and kind in (int, float):
        return False
    if isinstance(value, str) and kind is Sequence:
        return False
    return isinstance(value, _KINDS[kind][0] if kind in _KINDS else kind)


def check_positive(job: Any, *names: str, least: int = 1) -> None:
    """Refuse fields of a job that are no whole number from `least` on; None, where it may be.

    Raises:
        UserError: one is not.
    """
    hints = typing.get_type_hints(type(job))
    for name in names:
        value = getattr(job, name)
        if value is None and types.NoneType in typing.get_args(hints[name]):
            continue
        if type(value) is not int or value < least:
            raise UserError(
                f"{flag(name)} is {value!r}, expected a whole number of at least {least}"
            )


def check_number(
    job: Any, name: str, *, least: float = 0.0, most: float = math.inf, above: bool = False
) -> None:
    """Refuse a field of a job that is neither a finite number in a range nor None.

    Args:
        job: has the field.
        name: of it.
        least, most: ends of the range, both in it.
        above: leave `least` out.

    Raises:
        UserError: it is not.
    """
    value = getattr(job, name)
    if value is None:
        return
    if math.isfinite(value) and least <= value <= most and not (above and value == least):
        return
    low = "above" if above else "of at least"
    high = "" if math.isinf(most) else f", {most:g} at most"
    raise UserError(f"{flag(name)} is {value}, expected a number {low} {least:g}{high}")


def check_files(job: Any, name: str) -> None:
    """Refuse a field of a job that is not a list of files.

    Raises:
        UserError: it is one path, or there is none.
    """
    paths = getattr(job, name)
    if isinstance(paths, str | os.PathLike) or not paths:
        raise UserError(f"{flag(name)} is {paths!r}, expected a list of files")
