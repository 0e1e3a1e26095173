"""Which tokens of a source are tokens of the pivot, in one response."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_infifpo.alignment import align_spans


@dataclass(frozen=True, slots=True)
class Response:
    """A model's scored tokens of a response.

    Attributes:
        lengths: `[K]`, bytes of each; 0 of special tokens.
        whole: identity of the bytes, joined.
        inner: the same without white space at both ends.
        lead, trail: bytes of that white space.
    """

    lengths: np.ndarray
    whole: int
    inner: int
    lead: int
    trail: int


@dataclass(frozen=True, slots=True)
class Alignment:
    """What of a source is comparable with what of the pivot.

    Attributes:
        rows: int64 `[n]`, tokens of the pivot that the source has a distribution for, ascending.
        source_rows: int64 `[n]`, the source's tokens of these distributions.
        chunks: int64 `[C, 2]`, first and end of the pivot's tokens of the other chunks.
        source_chunks: int64 `[C, 2]`, the same of the source's.
    """

    rows: np.ndarray
    source_rows: np.ndarray
    chunks: np.ndarray
    source_chunks: np.ndarray


def same_tokenizer(here: Mapping[str, Any], there: Mapping[str, Any]) -> bool:
    """Whether two manifests, of tokens or of log-probs, name the same tokenizer."""
    known = here["tokenizer"]["tokenizer_sha256"]
    return known is not None and known == there["tokenizer"]["tokenizer_sha256"]


def _identity(length: int) -> Alignment:
    """Return the alignment of the same tokens."""
    rows, nothing = np.arange(length), np.zeros((0, 2), np.int64)
    return Alignment(rows, rows, nothing, nothing)


def align_response(
    pivot: Response, source: Response, *, is_pivot: bool, same_ids: bool, starts_suffice: bool
) -> Alignment | None:
    """Align a response's tokens, where both models have read the same text.

    A row is comparable where both begin a chunk there, so that what stands before is the same text,
    and the chunk is one token here and there. Where the texts agree but for white space at their
    ends, which chat templates add or take away, that is left out, and so is every token that has
    some of it, with its chunk. What stands behind such white space at the beginning is comparable
    all the same, what stands behind it at the end is not. Special tokens, which have no bytes,
    correspond where each side has one there.

    Args:
        pivot: the pivot's tokens.
        source: the source's.
        is_pivot: the source is the initial pivot, so its tokens are the pivot's.
        same_ids: both have the same tokenizer: the same text in tokens of the same lengths is then
            the same tokens, special ones, too.
        starts_suffice: a row is comparable wherever a chunk begins: ids that would be ambiguous
            are kept as groups.

    Returns:
        None where the texts differ.
    """
    same = same_ids and pivot.whole == source.whole
    if is_pivot or (same and np.array_equal(pivot.lengths, source.lengths)):
        return _identity(len(source.lengths))
    if pivot.whole == source.whole:
        sides = _Side(pivot.lengths, 0, 0), _Side(source.lengths, 0, 0)
    elif pivot.inner == source.inner:
        sides = (
            _Side(pivot.lengths, pivot.lead, pivot.trail),
            _Side(source.lengths, source.lead, source.trail),
        )
    else:
        return None
    if sides[0].total != sides[1].total:
        return None
    return _align(*sides, starts_suffice)


class _Side:
    """One model's tokens; those with bytes apart from special ones.

    Attributes:
        lengths: `[T]`, bytes of the T tokens that have some, without what is clipped.
        at: `[T]`, where they are among all tokens.
        special_at: where the special tokens are that stand before what is clipped at the end.
        special_place: behind how many bytes each of those stands.
        total: bytes.
    """

    def __init__(self, lengths: np.ndarray, lead: int, trail: int) -> None:
        ends = np.cumsum(lengths, dtype=np.int64)
        all_bytes = int(ends[-1]) if len(ends) else 0
        if lead + trail >= all_bytes:  # nothing but white space is at the end
            lead, trail = 0, all_bytes
        clipped = np.clip(ends, lead, all_bytes - trail) - lead
        self.total = int(clipped[-1]) if len(clipped) else 0
        left = np.diff(clipped, prepend=0)
        self.at = np.flatnonzero(left)
        self.special_at = np.flatnonzero((lengths == 0) & (ends <= all_bytes - trail))
        self.special_place = clipped[self.special_at]
        self.lengths = left[self.at]
        self._touched = self.lengths != lengths[self.at]

    def chunks(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Say of chunks: how many tokens, whether clipped, first and end in all tokens `[C, 2]`.

        Args:
            starts: `[C + 1]`, among the tokens that have bytes.
        """
        before = np.concatenate([[0], np.cumsum(self._touched)])
        first, end = starts[:-1], starts[1:]
        spans = np.zeros((len(first), 2), np.int64)
        there = end > first
        spans[there, 0], spans[there, 1] = self.at[first[there]], self.at[end[there] - 1] + 1
        return end - first, before[end] > before[first], spans

    def specials(self) -> tuple[np.ndarray, np.ndarray]:
        """Return where a special token stands alone: behind how many bytes, and which token."""
        places, first, count = np.unique(self.special_place, return_index=True, return_counts=True)
        return places[count == 1], self.special_at[first[count == 1]]


def _align(a: _Side, b: _Side, starts_suffice: bool) -> Alignment:
    starts = align_spans(a.lengths, b.lengths)
    (count_a, clipped_a, span_a), (count_b, clipped_b, span_b) = (
        a.chunks(starts[0]),
        b.chunks(starts[1]),
    )
    clean = ~(clipped_a | clipped_b)
    single = clean & (count_a == 1) & (count_b == 1)
    begins = clean & (count_a > 0) & (count_b > 0) if starts_suffice else single
    # A chunk with a special token within is no text that the source gives a probability to.
    whole = (np.diff(span_a)[:, 0] == count_a) & (np.diff(span_b)[:, 0] == count_b)
    chunk = clean & ~single & whole & (count_a > 0) & (count_b > 0)
    (places_a, special_a), (places_b, special_b) = a.specials(), b.specials()
    _, here, there = np.intersect1d(places_a, places_b, assume_unique=True, return_indices=True)
    rows = np.concatenate([span_a[begins, 0], special_a[here]])
    source_rows = np.concatenate([span_b[begins, 0], special_b[there]])
    order = np.argsort(rows, kind="stable")
    return Alignment(rows[order], source_rows[order], span_a[chunk], span_b[chunk])
