"""One response, aligned: comparable rows, chunks, white space at the ends, special tokens."""

import numpy as np
import pytest

from megatron_infifpo.fusing.align import Response, align_response
from megatron_infifpo.references.top_k import text_identity


def response(*tokens: str) -> Response:
    """Tokens of these texts; "" is a special one."""
    lengths = np.array([len(token) for token in tokens], np.int64)
    return Response(lengths, *text_identity("".join(tokens).encode()))


def align(pivot, source, **options):
    default = {"is_pivot": False, "same_ids": False, "starts_suffice": False}
    return align_response(pivot, source, **default | options)


def aligned(pivot, source, **options):
    found = align(response(*pivot), response(*source), **options)
    assert found is not None
    pairs = list(zip(found.rows.tolist(), found.source_rows.tolist(), strict=True))
    return pairs, found.chunks.tolist(), found.source_chunks.tolist()


@pytest.mark.parametrize(
    ("pivot", "source", "rows", "chunks", "source_chunks"),
    [
        # A number, one token here and three there: no row, one chunk.
        (["a", " 201", "b"], ["a", " 2", "0", "1", "b"], [(0, 0), (2, 4)], [[1, 2]], [[1, 4]]),
        (["ab", "c"], ["a", "bc"], [], [[0, 2]], [[0, 2]]),
        (["a", "b", "c"], ["abc"], [], [[0, 3]], [[0, 1]]),
        # The end of turn corresponds to the other's end of turn.
        (["a", ""], ["a", ""], [(0, 0), (1, 1)], [], []),
        (["ab", ""], ["a", "b", ""], [(1, 2)], [[0, 1]], [[0, 2]]),
        # One side has none, or two: no target there.
        (["a", ""], ["a"], [(0, 0)], [], []),
        (["a", ""], ["a", "", ""], [(0, 0)], [], []),
        (["a", "", "b"], ["a", "b", ""], [(0, 0), (2, 1)], [], []),
        (["", "a", ""], ["", "a", ""], [(0, 0), (1, 1), (2, 2)], [], []),
        # A chunk over a special token is no text of the source's.
        (["ab", "", "c"], ["a", "bc"], [], [], []),
        (["abc"], ["ab", "", "c"], [], [], []),
    ],
)
def test_by_hand(pivot, source, rows, chunks, source_chunks):
    assert aligned(pivot, source) == (rows, chunks, source_chunks)
    back = align(response(*source), response(*pivot))
    assert back is not None
    assert list(zip(back.source_rows.tolist(), back.rows.tolist(), strict=True)) == rows


def test_beginning_together_is_enough_for_groups():
    """Where ambiguous ids are groups, '201' and '2', '0', '1' are comparable at their first."""
    rows, chunks, _ = aligned(["a", "201", ""], ["a", "2", "0", "1", ""], starts_suffice=True)
    assert rows == [(0, 0), (1, 1), (2, 4)] and chunks == [[1, 2]]


@pytest.mark.parametrize("starts_suffice", [False, True])
@pytest.mark.parametrize(
    ("pivot", "source", "rows", "chunks", "source_chunks"),
    [
        # The source's template writes no blank before a reply: its first token is another text.
        ([" a", "b", ""], ["a", "b", ""], [(1, 1), (2, 2)], [], []),
        ([" ab", "c"], ["a", "b", "c"], [(1, 2)], [], []),
        (["\n", " a", "b"], [" a", "b"], [(2, 1)], [], []),
        # A token that is white space alone is left out, and all else is the same text.
        ([" ", "a", "b"], ["a", "b"], [(1, 0), (2, 1)], [], []),
        # Behind white space that differs at the end nothing is comparable.
        (["a", "b\n", ""], ["a", "b", ""], [(0, 0)], [], []),
        (["a", "b", "\n", ""], ["a", "b", ""], [(0, 0), (1, 1)], [], []),
        (["a", "\n", ""], ["a", " ", ""], [(0, 0)], [], []),
        (["a", "ab", "\n", ""], ["a", "a", "b\n\n", ""], [(0, 0)], [], []),
        (["a", "", "\n"], ["a", ""], [(0, 0), (1, 1)], [], []),
        (["a", "", "\n", ""], ["a", ""], [(0, 0), (1, 1)], [], []),
        # That both have as much does not say that it is the same.
        ([" ", "a", "\n", ""], ["a", " ", ""], [(1, 0)], [], []),
    ],
)
def test_white_space_at_the_ends(pivot, source, rows, chunks, source_chunks, starts_suffice):
    found = aligned(pivot, source, starts_suffice=starts_suffice)
    assert found == (rows, chunks, source_chunks)


@pytest.mark.parametrize(
    ("pivot", "source"), [(["a"], ["b"]), (["a b"], ["ab"]), (["a"], [""]), (["é"], ["e"])]
)
def test_other_text(pivot, source):
    assert align(response(*pivot), response(*source)) is None


def test_damaged_lengths_are_no_alignment():
    """The same text, of lengths that cannot be its."""
    good = response("ab", "c")
    bad = Response(np.array([2, 2]), good.whole, good.inner, 0, 0)
    assert align(good, bad) is None


def test_chunks_behind_white_space_and_before_it():
    found = aligned(["\n", "ab", "c", "d", " "], ["a", "b", "cd"])
    assert found == ([], [[1, 2], [2, 4]], [[0, 2], [2, 3]])


def test_nothing_but_white_space():
    for other in (" ", "\t\t", ""):
        assert aligned(["  ", ""], [other, ""]) == ([], [], [])
    assert aligned(["  ", ""], ["  ", ""]) == ([(0, 0), (1, 1)], [], [])


def test_the_same_tokens():
    """Of one tokenizer: special tokens, too, however many stand together."""
    tokens, rows = ["a", "", "", "b"], [(i, i) for i in range(4)]
    assert aligned(tokens, tokens, same_ids=True) == (rows, [], [])
    assert aligned(tokens, tokens) == ([(0, 0), (3, 3)], [], [])
    # The pivot's own log-probs may know a text without the blank that SentencePiece puts before it.
    assert aligned([" a", "b"], ["a", "b"], is_pivot=True) == ([(0, 0), (1, 1)], [], [])
    # Other tokens of the same text, and another text, are aligned as any.
    assert aligned(["ab", "c"], ["a", "b", "c"], same_ids=True)[0] == [(1, 2)]
    assert align(response("ab"), response("a", "c"), same_ids=True) is None


def test_random_texts():
    """Rows are the tokens with the same two borders on both sides: every pair is looked at."""
    rng = np.random.default_rng(2)
    for _ in range(300):
        total = int(rng.integers(1, 30))
        sides = []
        for _ in range(2):
            count = int(rng.integers(0, total))
            inside = rng.choice(np.arange(1, total), min(count, total - 1), False)
            sides.append(np.diff([0, *sorted(inside), total]))
        a, b = (Response(side, 1, 1, 0, 0) for side in sides)
        found = align(a, b)
        assert found is not None
        spans = [list(zip(np.cumsum(s) - s, np.cumsum(s), strict=True)) for s in sides]
        expected = [
            (i, k) for i, x in enumerate(spans[0]) for k, y in enumerate(spans[1]) if x == y
        ]
        assert list(zip(found.rows, found.source_rows, strict=True)) == expected
        covered = np.zeros(len(sides[0]), int)
        covered[found.rows] += 1
        for first, end in found.chunks:
            covered[first:end] += 1
        assert (covered == 1).all()
