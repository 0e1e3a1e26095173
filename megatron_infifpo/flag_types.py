"""How flags' values are read: numbers in their ranges."""

import argparse
import contextlib
import math
from collections.abc import Callable


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
