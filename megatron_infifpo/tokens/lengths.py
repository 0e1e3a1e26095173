"""How long records are by domain: what a limit on their length is chosen by, and what it loses."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from megatron_infifpo.tokens.dataset import TokenDataset

NAMED = 10  # domains that a table or a line names; data may have thousands


class DomainLengths(NamedTuple):
    """Tokens of a domain's prompts, each with its longest response.

    Attributes:
        name: of the domain.
        records: how many it has.
        median: that half of them have at most.
        most: that 95 % of them have at most.
        longest: of all.
    """

    name: str
    records: int
    median: int
    most: int
    longest: int


def domain_lengths(tokens: TokenDataset) -> list[DomainLengths]:
    """Return how long prompts are with their longest response, those with most records first.

    Masked records have no length and are not counted.
    """
    lengths = tokens.prompt_lengths + tokens.response_lengths.max(axis=1)
    found = []
    for name, inside in _largest(tokens.domains, tokens.domain_codes, ~tokens.masked_records):
        inside = inside & ~tokens.masked_records
        values = np.percentile(lengths[inside], (50, 95, 100), method="higher")
        found.append(DomainLengths(name, int(inside.sum()), *map(int, values)))
    return found


def by_domain(
    names: Sequence[str], codes: np.ndarray, holds: np.ndarray, lengths: np.ndarray | None = None
) -> str:
    """Say of how many records of each domain something holds; where of most, first.

    Args:
        names: of domains, by code.
        codes: `[N]`, domains of the records.
        holds: bool `[N]`.
        lengths: `[N]`, their tokens, to say each domain's longest; None: not said.
    """
    said = []
    for name, inside in _largest(names, codes, holds):
        longest = "" if lengths is None else f" (longest {lengths[inside].max():,})"
        said.append(f"{name} {(holds & inside).sum()} of {inside.sum()}{longest}")
    return ", ".join(said)


def _largest(
    names: Sequence[str], codes: np.ndarray, counted: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield names of domains, and bool `[N]`, their records: most counted ones first.

    Domains without a counted record are left out; behind the first ones, all others are one.
    """
    counts = np.bincount(codes[counted], minlength=len(names))
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    first, others = np.split(order, [NAMED if len(order) > NAMED + 1 else len(order)])
    for code in first:
        yield names[code], codes == code
    if len(others):
        yield f"{len(others)} others", np.isin(codes, others)
