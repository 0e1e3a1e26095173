"""Which ids of the pivot an id of a source stands for.

Two ids with the same bytes are the same token, but not always the same event. A source that splits
numbers says with '2' that the text goes on with any number that begins so; a pivot that does not
says that the number is 2. With

    phi(w)   the first id that the source makes of the pivot's token w alone
    psi(s)   the first id that the pivot makes of the source's token s alone, where s has no twin

both vocabularies fall into the same classes of texts: w belongs to the class of phi(w), s without a
twin to that of psi(s). Most classes have one id of the pivot. An id of a source whose class has
several is *ambiguous*.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from megatron_infifpo.tokens.special_text import SpecialText
from megatron_infifpo.tokens.text_ids import TextIds
from megatron_infifpo.tokens.tokenization import ChatTokenizer

TAIL = -1
"""What an id is mapped to that the pivot has nothing for: its mass belongs to all other ids."""
AMBIGUOUS = ("digits", "tail", "group", "id")
"""What becomes of ambiguous ids: of numbers or of all into the tail, groups, or as if not so."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's tokens.

    Attributes:
        pieces: `[V]` by id, a token's bytes; b"" of special ones.
        end_of_turn_ids: what ends a reply.
        encode: the ids of texts, each on its own, without special tokens around them.
        identity: equal of equal vocabularies.
    """

    pieces: Sequence[bytes]
    end_of_turn_ids: Sequence[int]
    encode: Callable[[list[str]], list[list[int]]]
    identity: str = ""

    @classmethod
    def of(cls, chat: ChatTokenizer) -> Self:
        """Return a chat tokenizer's vocabulary.

        Raises:
            UserError: its tokens are no bytes.
        """

        encode = TextIds(chat.tokenizer, SpecialText(chat.tokenizer)).ids
        identity = chat.fingerprint()["tokenizer_sha256"]
        return cls(chat.token_bytes.pieces, chat.end_of_turn_ids, encode, identity)

    def ids_of(self, pieces: Sequence[bytes]) -> list[list[int]]:
        """Return the ids of each piece of text; none where it is no text, or they are not it."""
        texts = [piece.decode("utf-8", errors="ignore") for piece in pieces]
        found = [
            ids if self._join(ids) == piece else []
            for ids, piece in zip(self.encode(texts), pieces, strict=True)
        ]
        # SentencePiece writes a blank before a text: behind a line break it does not.
        again = [i for i, ids in enumerate(found) if not ids and texts[i].encode() == pieces[i]]
        before = self.encode(["\n"])[0] if again else []
        behind = self.encode(["\n" + texts[i] for i in again])
        for i, ids in zip(again, behind, strict=True):
            rest = ids[len(before) :]
            if ids[: len(before)] == before and self._join(rest) == pieces[i]:
                found[i] = rest
        return found

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The id of each piece; of several ids the one that the tokenizer uses."""
        found: dict[bytes, int] = {}
        several: set[bytes] = set()
        for number, piece in enumerate(self.pieces):
            if piece:
                if piece in found:
                    several.add(piece)
                found[piece] = number
        listed = sorted(several)
        for piece, ids in zip(listed, self.ids_of(listed), strict=True):
            if len(ids) == 1:
                found[piece] = ids[0]
        return found

    def _join(self, ids: Iterable[int]) -> bytes:
        return b"".join([self.pieces[number] for number in ids])


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """What a source's ids become.

    Attributes:
        ids: int32 `[V]` by the source's id: the pivot's, `TAIL`, or the group -(id + 2).
        groups: ids of the pivot in each group, int32.
        counts: ids that the source has; of them twins, with the bytes of one of the pivot's; of
            twins ambiguous ones; and all that are mapped.
    """

    ids: np.ndarray
    groups: list[np.ndarray]
    counts: dict[str, int]


def map_vocabulary(
    source: Vocabulary, pivot: Vocabulary, size: int, ambiguous: str = "digits"
) -> VocabularyMap:
    """Map a source's ids onto the pivot's.

    Args:
        source: the source's vocabulary.
        pivot: the pivot's.
        size: ids that the source's model knows, padding included.
        ambiguous: one of `AMBIGUOUS`.
    """
    known, size = len(source.pieces), max(size, len(source.pieces))
    if source.identity and source.identity == pivot.identity:
        same = np.full(size, TAIL, np.int32)
        same[:known] = twins = np.arange(known)
        here, there = source.end_of_turn_ids, pivot.end_of_turn_ids
        # Within text, one id that ends the turns of one model alone is another event for the other.
        if here and there and not pivot.pieces[there[0]]:
            if len(here) == 1 or not source.pieces[here[0]]:
                same[there[0]] = TAIL
                same[here[0]] = there[0]
        return VocabularyMap(same, [], _counts(same, twins, np.zeros(known, bool)))
    twins = _twins(source, pivot)
    result, groups, several = twins.copy(), list[np.ndarray](), np.zeros(known, bool)
    if ambiguous != "id":
        classes = _Classes(source, pivot, twins)
        several, one = classes.members_of > 1, classes.only_member
        if ambiguous == "digits":
            digits = np.array([piece.lstrip(b" ").isdigit() for piece in source.pieces])
            result[digits] = np.where(several, TAIL, one)[digits]
        else:
            result = np.where(several, TAIL, one)
        if ambiguous == "group":
            groups, numbers = classes.groups()
            result[several] = -(numbers[several] + 2)
    _map_end_of_turn(source, pivot, result)
    padded = np.full(size, TAIL, np.int32)
    padded[:known] = result
    return VocabularyMap(padded, groups, _counts(padded, twins, several))


class _Classes:
    """The classes that two vocabularies have in common.

    Attributes:
        members_of: int64 `[V]` by the source's id, how many ids of the pivot its class has.
        only_member: int32 `[V]`, the one, where there is one, else `TAIL`.
    """

    def __init__(self, source: Vocabulary, pivot: Vocabulary, twins: np.ndarray) -> None:
        # An id whose text the pivot writes with another id is of no class.
        used = pivot.by_bytes
        written = [p if used.get(p) == i else b"" for i, p in enumerate(pivot.pieces)]
        firsts = _first_ids(written, source)  # phi, [V of the pivot]
        alone = [
            b"" if twin >= 0 else piece for piece, twin in zip(source.pieces, twins, strict=True)
        ]
        over = np.where(twins >= 0, twins, _first_ids(alone, pivot))  # psi, or the twin itself
        itself = np.arange(len(source.pieces))
        root = np.where(over >= 0, firsts[over], TAIL)
        root = np.where(root >= 0, root, itself)
        # Each step goes to a shorter token, or to the id of the class: there are no circles.
        while (root[root] != root).any():
            root = root[root]
        self._root = root
        self._placed = np.flatnonzero(firsts >= 0)
        self._class = root[firsts[self._placed]]  # of each id of the pivot
        sizes = np.bincount(self._class, minlength=len(root))
        last = np.full(len(root), TAIL, np.int32)
        last[self._class] = self._placed
        self.members_of = sizes[root]
        self.only_member = np.where(self.members_of == 1, last[root], TAIL).astype(np.int32)

    def groups(self) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the classes of several ids, and by the source's id the number of its class."""
        order = np.argsort(self._class, kind="stable")
        names, starts = np.unique(self._class[order], return_index=True)
        parts = np.split(self._placed[order].astype(np.int32), starts[1:])
        numbers, groups = np.full(len(self._root), TAIL), list[np.ndarray]()
        for name, part in zip(names, parts, strict=True):
            if len(part) > 1:
                numbers[name] = len(groups)
                groups.append(part)
        return groups, numbers[self._root]


def _first_ids(pieces: Sequence[bytes], other: Vocabulary) -> np.ndarray:
    """Return the first id that another vocabulary makes of each piece, int32; `TAIL`: none."""
    known = other.by_bytes
    found = np.array([known.get(piece, TAIL) if piece else TAIL for piece in pieces], np.int32)
    wanted = [i for i in np.flatnonzero(found < 0).tolist() if pieces[i]]
    for i, ids in zip(wanted, other.ids_of([pieces[i] for i in wanted]), strict=True):
        found[i] = ids[0] if ids else TAIL
    return found


def _twins(source: Vocabulary, pivot: Vocabulary) -> np.ndarray:
    """Return the pivot's id with the same bytes, int32 `[V]` by the source's id; `TAIL`: none."""
    known = pivot.by_bytes
    return np.array([known.get(p, TAIL) if p else TAIL for p in source.pieces], np.int32)


def _map_end_of_turn(source: Vocabulary, pivot: Vocabulary, ids: np.ndarray) -> None:
    """Map what ends a reply, where both models have a special token for that."""
    here, there = list(source.end_of_turn_ids[:1]), list(pivot.end_of_turn_ids[:1])
    if here and there and not source.pieces[here[0]] and not pivot.pieces[there[0]]:
        ids[here[0]] = there[0]


def _counts(ids: np.ndarray, twins: np.ndarray, several: np.ndarray) -> dict[str, int]:
    return {
        "ids": len(twins),
        "twins": int((twins >= 0).sum()),
        "ambiguous": int((several & (twins >= 0)).sum()),
        "mapped": int((ids != TAIL).sum()),
    }
