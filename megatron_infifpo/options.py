"""Options of methods, losses and fusions: what a value may be, and what is said about it.

A loss or a fusion declares an option at the keyword argument that takes it, default and all:

    def dpo(policy, reference, *, beta, label_smoothing: Annotated[float, Option(...)] = 0.0): ...

Its flag, help text and checks follow from that.
"""

import argparse
import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Option:
    """A number with a range, one of some choices, or, with neither, a switch.

    Attributes:
        help: what it is.
        range: where the formula makes sense, as `[0, 0.5)`; a round bracket leaves the end out.
        choices: names, or a registry by name, whose newest entries count.
        default: what a method takes where none is given; `declared` takes that of the signature.
        required: a caller of the function must give it; set by `declared`.
        why: why there is no default.
        grows: from 0, in proportion to the training that is done; functions take 0, too.
    """

    help: str
    range: str = ""
    choices: Collection[str] = ()
    default: Any = None
    required: bool = False
    why: str = ""
    grows: bool = False

    def at(self, value: Any, progress: float) -> Any:
        """Return the value when `progress`, a share in [0, 1], of the training is done."""
        return value * progress if self.grows else value

    def expected(self, value: Any) -> str | None:
        """Say what a value should have been; None if it is fine."""
        if self.choices:
            fine = isinstance(value, str) and value in self.choices
            return None if fine else f"one of {', '.join(self.choices)}"
        if not self.range:
            return None if isinstance(value, bool) else "True or False"
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return f"a number in {self.range}"
        number, (low, high) = float(value), map(float, self.range[1:-1].split(","))
        above = number >= low if self.range[0] == "[" else number > low
        below = number <= high if self.range[-1] == "]" else number < high
        return None if above and below else f"a number in {self.range}"

    def describe(self) -> str:
        """Say its range and default; argparse says the choices."""
        parts = [f"in {self.range}"] if self.range else []
        if self.grows:
            parts.append("growing linearly from 0 to this over training")
        default = f"{self.default:g}" if self.range and self.default is not None else self.default
        parts.append("needed" if default is None else f"default {default}")
        return ", ".join(parts)

    def parsing(self) -> dict[str, Any]:
        """Return how argparse reads it."""
        if self.choices:
            return {"choices": list(self.choices)}
        return {"type": float} if self.range else {"action": argparse.BooleanOptionalAction}


@functools.cache
def declared(function: Callable[..., Any]) -> Mapping[str, Option]:
    """Return the options that a loss or a fusion declares at its keyword arguments, by name."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        for option in getattr(hints.get(name), "__metadata__", ()):
            if isinstance(option, Option):
                required = parameter.default is parameter.empty
                default = option.default if required else parameter.default
                found[name] = replace(option, default=default, required=required)
    return found


@functools.cache
def values_read(function: Callable[..., Any], given: int) -> Mapping[str, bool]:
    """Values of a row that a loss or a fusion takes, by name, and whether it needs each.

    They are its parameters beyond the first so many that are `given`, beta and its options; one
    with a default can do without.
    """
    known = {"beta", *declared(function)}
    parameters = list(inspect.signature(function).parameters.values())[given:]
    return {p.name: p.default is p.empty for p in parameters if p.name not in known}


def described(help: str, users: Mapping[str, Option]) -> str:
    """Say what an option is, and its range and default for those that take it, by name."""
    groups: dict[str, list[str]] = {}
    for user, option in users.items():
        groups.setdefault(option.describe(), []).append(user)
    return f"{help} ({'; '.join(f'{", ".join(names)}: {text}' for text, names in groups.items())})"
