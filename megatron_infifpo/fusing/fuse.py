"""What several sources say of one response, fused into one sparse distribution a token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_infifpo.references.soft_targets import SEVERAL, VALUES, SoftTargets


@dataclass(frozen=True, slots=True)
class Candidate:
    """What one source says of one response, in the pivot's ids.

    Attributes:
        number: of the source among all.
        weight: its share in a mean.
        cross_entropy: of the response under the source, nats a byte or a token.
        rows: int64 `[n]`, the pivot's tokens that it has a distribution for.
        ids: int `[n, k]`, of the pivot; `TAIL` where it has none for an id of the source.
        probs: float64 `[n, k]`.
        tail: float64 `[n]`, the mass of all ids that are not among the k.
        values: float32 `[n, k]`, the source's own log-probs.
        chunks: int64 `[C, 2]`, first and end of the pivot's tokens of other chunks.
        chunk_logps: float64 `[C]`, of each chunk's text under the source.
    """

    number: int
    weight: float
    cross_entropy: float
    rows: np.ndarray
    ids: np.ndarray
    probs: np.ndarray
    tail: np.ndarray
    values: np.ndarray
    chunks: np.ndarray
    chunk_logps: np.ndarray


def mince(cross_entropies: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The source that predicts the response best: FuseLLM's MinCE. The first one wins ties."""
    return np.eye(len(cross_entropies))[cross_entropies.argmin()]


def average_ce(cross_entropies: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A softmax over `exp(-CE)`, as FuseLLM's code has it: never far from equal weights."""
    scores = np.exp(np.exp(-cross_entropies))
    return scores / scores.sum()


def mean(cross_entropies: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weights of sources.yaml."""
    return weights / weights.sum()


Fusion = Callable[[np.ndarray, np.ndarray], np.ndarray]
# Each takes cross-entropies and weights `[n]` of a response's sources, and returns shares `[n]`.
FUSIONS: dict[str, Fusion | None] = {
    "mince": mince,
    "average-ce": average_ce,
    "mean": mean,
    VALUES: None,
}


def fuse(
    candidates: Sequence[Candidate], length: int, *, fusion: str, top_k: int, sources: int
) -> SoftTargets | None:
    """Fuse what sources say of one response; where several do, in proportion to their shares.

    Args:
        candidates: those that take part.
        length: scored tokens of the pivot.
        fusion: a key of `FUSIONS`.
        top_k: ids of a row that are kept; the mass of others goes to the tail.
        sources: of the data set, M.

    Returns:
        None where no source takes part.
    """
    if not candidates:
        return None
    shares_of = FUSIONS[fusion]
    if shares_of is None:
        return _values(candidates, length, top_k, sources)
    shares = shares_of(
        np.array([c.cross_entropy for c in candidates]), np.array([c.weight for c in candidates])
    )
    chosen = [(c, share) for c, share in zip(candidates, shares, strict=True) if share > 0]
    total, count, first = np.zeros(length), np.zeros(length, np.int64), np.zeros(length, np.uint8)
    for candidate, share in chosen:
        total[candidate.rows] += share
        count[candidate.rows] += 1
        first[candidate.rows] = candidate.number + 1
    tail = np.where(count > 0, 0.0, 1.0)
    rows, ids, probs = [], [], []
    for candidate, share in chosen:
        part = share / total[candidate.rows]
        mass, kept = part[:, None] * candidate.probs, candidate.ids != -1
        tail[candidate.rows] += part * candidate.tail + np.where(kept, 0.0, mass).sum(axis=1)
        rows.append(np.broadcast_to(candidate.rows[:, None], kept.shape)[kept])
        ids.append(candidate.ids[kept])
        probs.append(mass[kept])
    kept_ids, kept_probs, dropped = _largest(
        np.concatenate(rows), np.concatenate(ids), np.concatenate(probs), length, top_k
    )
    # A row of the tail alone teaches nothing: it is none.
    taught = kept_ids[:, 0] != -1
    chunks, chunk_logps = _chunks(chosen, taught)
    return SoftTargets(
        ids=kept_ids,
        probs=kept_probs,
        tail=np.where(taught, tail + dropped, 1.0),
        sources=np.where(taught, np.where(count > 1, SEVERAL, first), 0).astype(np.uint8),
        chunks=chunks,
        chunk_logps=chunk_logps[:, 0],
        chunk_weights=chunk_logps[:, 1],
    )


def _largest(
    rows: np.ndarray, ids: np.ndarray, probs: np.ndarray, length: int, top_k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add what is of the same row and id, and keep the largest.

    Args:
        rows, ids, probs: `[E]` each.
        length: rows, K.
        top_k: ids of a row, k.

    Returns:
        ids int32 `[K, k]`, descending, -1 where there are fewer; their probs `[K, k]`; and `[K]`
        what was left out.
    """
    found, left = np.full((length, top_k), -1, np.int32), np.zeros((length, top_k))
    if not len(rows):
        return found, left, np.zeros(length)
    # One key a sort is many times faster than lexsort; ids are below 2 ** 31.
    order = np.argsort(rows * 2**32 + ids, kind="stable")
    rows, ids, probs = rows[order], ids[order], probs[order]
    begins = np.flatnonzero((np.diff(rows, prepend=-1) != 0) | (np.diff(ids, prepend=ids[0]) != 0))
    rows, ids, probs = rows[begins], ids[begins], np.add.reduceat(probs, begins)
    order = np.argsort(rows - probs / 2, kind="stable")
    rows, ids, probs = rows[order], ids[order], probs[order]
    places = np.arange(len(rows)) - np.searchsorted(rows, rows)
    keep = places < top_k
    found[rows[keep], places[keep]] = ids[keep]
    left[rows[keep], places[keep]] = probs[keep]
    return found, left, np.bincount(rows[~keep], probs[~keep], minlength=length)


def _chunks(
    chosen: Sequence[tuple[Candidate, float]], taught: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Join the sources' chunks: int32 `[C, 2]`; log-prob and weight, float32 `[C, 2]`.

    A weight is the source's share among those that have a row or a chunk at some of the tokens.

    Args:
        chosen: sources and their shares.
        taught: bool `[K]`, which tokens have a target.
    """
    shares = np.array([share for _, share in chosen])
    says = np.zeros((len(chosen), len(taught) + 1), np.int64)
    for here, (candidate, _) in zip(says, chosen, strict=True):
        first, end = candidate.chunks.T
        here += np.bincount(first, minlength=len(here)) - np.bincount(end, minlength=len(here))
    says = np.cumsum(says, axis=1)[:, :-1]  # how many chunks hold each token
    for here, (candidate, _) in zip(says, chosen, strict=True):
        here[candidate.rows] += taught[candidate.rows]
    before = np.concatenate([np.zeros((len(says), 1), np.int64), np.cumsum(says, axis=1)], axis=1)
    chunks, logps = [], []
    for candidate, share in chosen:
        first, end = candidate.chunks.T
        present = shares @ (before[:, end] > before[:, first])
        chunks.append(candidate.chunks)
        logps.append(np.column_stack([candidate.chunk_logps, share / present]))
    return np.concatenate(chunks).astype(np.int32), np.concatenate(logps).astype(np.float32)


def _values(candidates: Sequence[Candidate], length: int, top_k: int, sources: int) -> SoftTargets:
    """Keep the sources' own values, side by side."""
    values = np.full((length, sources, top_k), np.nan, np.float32)
    for candidate in candidates:
        values[candidate.rows, candidate.number] = candidate.values[:, :top_k]
    return SoftTargets(
        ids=np.zeros((length, 0), np.int32),
        probs=np.zeros((length, 0), np.float32),
        tail=np.ones(length, np.float32),
        sources=np.zeros(length, np.uint8),
        chunks=np.zeros((0, 2), np.int32),
        chunk_logps=np.zeros(0, np.float32),
        chunk_weights=np.zeros(0, np.float32),
        values=values,
    )
