"""What a data set's manifest says of records: few texts, each about many of them.

Notes say why a record is masked or cut; remarks say what of the template's doing one would not
think.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError

# Texts of templates may name what a record has in it: a manifest must not hold a million of them.
DISTINCT = 100
OTHERS = "for other reasons than the ones listed"
LONGEST = 300  # characters of a text


def one_line(text: str) -> str:
    """Return a text without line breaks, that any encoding can hold, and not too long."""
    text = " ".join(text.split()).encode(errors="replace").decode()
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."


class Notes:
    """Collects what is said of records, in their order."""

    def __init__(self) -> None:
        """Begin with none."""
        self._indices: dict[str, list[int]] = {}

    def add(self, index: int, text: str) -> None:
        """Say something of a record; indices ascend."""
        if text not in self._indices and len(self._indices) >= DISTINCT:
            text = OTHERS
        indices = self._indices.setdefault(text, [])
        if indices[-1:] != [index]:
            indices.append(index)

    def counts(self) -> dict[str, int]:
        """Return how many records each text is about."""
        return {text: len(found) for text, found in self._indices.items()}

    def fields(self, kind: str) -> dict[str, Any]:
        """Return what a manifest says: the records of each text, and how many they are.

        Args:
            kind: "note" or "remark".
        """
        ranges = {text: format_ranges(found) for text, found in self._indices.items()}
        return {f"{kind}s": ranges, f"{kind}_counts": self.counts()}


def find_notes(notes: Mapping[str, str], index: int) -> list[str]:
    """Return what a manifest's notes or remarks say of a record."""
    parsed = ((text, parse_ranges(ranges)) for text, ranges in notes.items())
    return [text for text, ranges in parsed if any(index in found for found in ranges)]


def counted(counts: Mapping[str, int]) -> str:
    """Write counts by text in a line."""
    return "; ".join(f"{count} {text}" for text, count in counts.items())


def noted(notes: Mapping[str, str], count: int, where: str) -> np.ndarray:
    """Return bool `[count]`: the records that a manifest's notes are about.

    Raises:
        UserError: they are about other records than these; names the manifest `where`.
    """
    found = np.zeros(count, dtype=bool)
    for ranges in notes.values():
        for part in parse_ranges(ranges):
            if part.stop > count:
                raise UserError(
                    f"{where} has a note about record {part.stop - 1} of {count}: write it again"
                )
            found[part.start : part.stop] = True
    return found


def format_ranges(indices: list[int]) -> str:
    """Write ascending indices as text: [0, 1, 2, 7] is "0-2,7"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)


def parse_ranges(text: str) -> list[range]:
    """Read what `format_ranges` wrote.

    Raises:
        UserError: it did not write that.
    """
    if not isinstance(text, str) or not re.fullmatch(r"(\d{1,12}(-\d{1,12})?(,|$))*", text):
        raise UserError(f"{str(text)[:40]!r} are no records, expected such as '0-3,7'")
    borders = [part.split("-") for part in text.split(",") if part]
    return [range(int(ends[0]), int(ends[-1]) + 1) for ends in borders]
