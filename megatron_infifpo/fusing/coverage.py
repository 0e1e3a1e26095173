"""What sources can teach: how much of the pivot's tokens they speak of, by domain."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_infifpo.fusing.source import Found

COLUMNS = ("responses", "tokens", "comparable", "mass", "beyond", "chunks", "nats", "units", "wins")
ALL = ""
"""All domains together; no domain is called so."""
_SHOWN = {ALL: "all"}


class Coverage:
    """Adds up what sources say, response by response.

    Attributes:
        masked: of each source, for each reason how many responses it takes no part in.
    """

    def __init__(self, domains: Sequence[str], sources: Sequence[str], ce_per: str) -> None:
        """Begin with nothing.

        Args:
            domains: names of the D domains.
            sources: names of the M sources.
            ce_per: what cross-entropies are by, "byte" or "token".
        """
        self._domains, self._sources, self._unit = list(domains), list(sources), ce_per
        self._sums = np.zeros((len(domains), len(sources), len(COLUMNS)))
        self._out = np.zeros((len(domains), len(sources)), np.int64)
        self.masked: dict[str, Counter[str]] = {name: Counter() for name in sources}

    def mask(self, domain: int, source: int, reason: str) -> None:
        """Count a response that a source takes no part in."""
        self._out[domain, source] += 1
        self.masked[self._sources[source]][reason] += 1

    def add(self, domain: int, length: int, found: Sequence[Found]) -> None:
        """Count a response of `length` tokens of the pivot, and what sources say of it."""
        if not found:
            return
        best = min(found, key=lambda one: one.candidate.cross_entropy)
        for one in found:
            said = one.candidate
            mass = float(said.probs[said.ids != -1].sum())
            self._sums[domain, said.number] += (
                1, length, len(said.rows), mass, float(said.tail.sum()), len(said.chunks),
                one.nats, one.units, one is best,
            )  # fmt: skip

    def table(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Return the numbers by domain and source, and at last those of `ALL`."""
        found = {}
        for name, inside in self._parts():
            sums, out = self._sums[inside].sum(axis=0), self._out[inside].sum(axis=0)
            found[name] = {
                source: self._row(sums[m], int(out[m])) for m, source in enumerate(self._sources)
            }
        return found

    def _parts(self) -> list[tuple[str, list[int]]]:
        there = [d for d in range(len(self._domains)) if self._sums[d].any() or self._out[d].any()]
        return [*((self._domains[d], [d]) for d in there), (ALL, there)]

    def _row(self, sums: np.ndarray, masked: int) -> dict[str, float | None]:
        value = dict(zip(COLUMNS, sums.tolist(), strict=True))
        rows = value["comparable"]
        mass, beyond = _share(value["mass"], rows), _share(value["beyond"], rows)
        return {
            "responses": int(value["responses"]),
            "masked": masked,
            "tokens": int(value["tokens"]),
            "comparable": _share(rows, value["tokens"]),
            "chunks": int(value["chunks"]),
            "mass": mass,
            "beyond_top_k": beyond,
            "no_twin": None if mass is None or beyond is None else max(1 - mass - beyond, 0.0),
            f"nats_per_{self._unit}": _share(value["nats"], value["units"]),
            "wins": int(value["wins"]),
        }

    def lines(self) -> list[str]:
        """Return the table as text."""
        width = max(map(len, ["source", *self._sources]))
        area = max(map(len, ["domain", *_SHOWN.values(), *self._domains]))
        lines = [
            f"{'domain':<{area}}  {'source':<{width}}{'responses':>10}{'masked':>8}{'tokens':>12}"
            f"{'comparable':>12}{'mass':>8}{'beyond k':>10}{'no twin':>9}"
            f"{f'nats/{self._unit}':>12}{'wins':>8}"
        ]
        for domain, rows in self.table().items():
            for source, row in rows.items():
                nats = row[f"nats_per_{self._unit}"]
                lines.append(
                    f"{_SHOWN.get(domain, domain):<{area}}  {source:<{width}}"
                    f"{row['responses']:>10}{row['masked']:>8}"
                    f"{row['tokens']:>12}{_percent(row['comparable']):>12}"
                    f"{_percent(row['mass']):>8}{_percent(row['beyond_top_k']):>10}"
                    f"{_percent(row['no_twin']):>9}{'-' if nats is None else f'{nats:.4f}':>12}"
                    f"{_percent(_share(row['wins'] or 0, row['responses'] or 0)):>8}"
                )
        for source, reasons in self.masked.items():
            lines += [f"{source}: {n} responses masked: {text}" for text, n in reasons.items()]
        return lines

    def nothing(self, *, chunks: bool) -> dict[str, str]:
        """Return the sources that have no comparable token, each with the reasons.

        Args:
            chunks: texts that are not one to one are comparable, too.
        """
        sums = dict(zip(COLUMNS, self._sums.sum(axis=0).astype(np.int64).T, strict=True))
        said = sums["comparable"] + chunks * sums["chunks"]
        found = {}
        for m, name in enumerate(self._sources):
            parts = [f"{n} responses masked ({text})" for text, n in self.masked[name].items()]
            if read := sums["responses"][m]:
                parts.append(f"{read} responses without a token in common")
            if not said[m]:
                found[name] = ", ".join(parts) or "no response"
        return found

    def fields(self) -> dict[str, Any]:
        """Return what a manifest says."""
        return {
            "masked": {source: dict(reasons) for source, reasons in self.masked.items()},
            "coverage": self.table(),
        }


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
