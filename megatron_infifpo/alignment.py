"""Where two tokenizers cut the same text: the exact alignment of their tokens by bytes."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def align_spans(lengths_a: ArrayLike, lengths_b: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Cut two tokenizations of one text into the finest chunks that both have.

    Both end a token at the end of every chunk, and nowhere else in it. Chunk c is the tokens
    `starts_a[c]:starts_a[c + 1]` here and `starts_b[c]:starts_b[c + 1]` there. O(P + S).

    Args:
        lengths_a: bytes of each of P tokens.
        lengths_b: bytes of each of S tokens of the same text. Tokens without bytes, such as special
            ones, go to the chunk before them, or to the first; callers better leave them out.

    Returns:
        `starts_a` and `starts_b`, int64 `[chunks + 1]` each.

    Raises:
        ValueError: the totals differ, or a length is negative or no whole number.
    """
    ends_a, ends_b = _ends(lengths_a, "lengths_a"), _ends(lengths_b, "lengths_b")
    total, other = (int(ends[-1]) if len(ends) else 0 for ends in (ends_a, ends_b))
    if total != other:
        raise ValueError(
            f"lengths_a are of {total} bytes and lengths_b of {other}, expected two tokenizations "
            "of the same text"
        )
    # Two ascending runs: a stable sort merges them, and what is in both is there twice.
    both = np.sort(np.concatenate([_distinct(ends_a), _distinct(ends_b)]), kind="stable")
    common = both[:-1][both[1:] == both[:-1]]
    if total == 0 and len(ends_a) + len(ends_b):
        common = np.zeros(1, np.int64)  # nothing but tokens without bytes: one chunk
    elif len(common) and common[0] == 0:
        common = common[1:]  # tokens without bytes at the beginning are of the first chunk
    starts = (np.searchsorted(ends, common, side="right") for ends in (ends_a, ends_b))
    starts_a, starts_b = (np.concatenate([[0], s]).astype(np.int64) for s in starts)
    return starts_a, starts_b


def _ends(lengths: ArrayLike, name: str) -> np.ndarray:
    """Return where in the text each token ends, int64."""
    given: np.ndarray[Any, Any] = np.asarray(lengths)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} is {given.dtype} {list(given.shape)}, expected a vector of whole numbers"
        )
    if given.size and given.min() < 0:
        raise ValueError(f"{name} has the length {given.min()}, expected at least 0")
    return np.cumsum(given, dtype=np.int64)


def _distinct(ends: np.ndarray) -> np.ndarray:
    """Return ascending numbers without repetitions."""
    return ends[np.diff(ends, prepend=-1) > 0]
