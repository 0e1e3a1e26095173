"""Alignment by bytes: what any two tokenizations of one text have in common."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_infifpo.alignment import align_spans


@st.composite
def two_tokenizations(draw):
    """Lengths of tokens of one text of up to 40 bytes, cut in two ways."""
    total = draw(st.integers(1, 40))
    places = st.sets(st.integers(1, total - 1)) if total > 1 else st.just(set())
    cuts = (sorted({0, total, *draw(places)}) for _ in range(2))
    return tuple(np.diff(cut) for cut in cuts)


def by_hand(a, b):
    """Cut wherever both have a border."""
    common = set(np.cumsum(a).tolist()) & set(np.cumsum(b).tolist())
    return tuple(
        [0, *(i + 1 for i, end in enumerate(np.cumsum(side).tolist()) if end in common)]
        for side in (a, b)
    )


@given(two_tokenizations())
def test_finest_common_partition(pair):
    a, b = pair
    starts = align_spans(a, b)
    assert tuple(part.tolist() for part in starts) == by_hand(a, b)
    for part, lengths in zip(starts, pair, strict=True):
        assert part.dtype == np.int64 and part[0] == 0 and part[-1] == len(lengths)
        assert (np.diff(part) > 0).all()
    # Both sides of a chunk are the same bytes.
    here, there = (np.add.reduceat(x, s[:-1]) for x, s in zip(pair, starts, strict=True))
    assert np.array_equal(here, there)


@given(two_tokenizations())
def test_finest_of_all(pair):
    """No partition into chunks of equal text has more of them: brute force over all borders."""
    a, b = (np.cumsum(side).tolist() for side in pair)
    chunks = len(align_spans(*pair)[0]) - 1
    assert chunks == sum(x == y for x in a for y in b)


@given(two_tokenizations())
def test_symmetry(pair):
    a, b = pair
    forth, back = align_spans(a, b), align_spans(b, a)
    assert np.array_equal(forth[0], back[1]) and np.array_equal(forth[1], back[0])


@given(two_tokenizations())
def test_identity_and_bytes(pair):
    """With itself every token is a chunk; with single bytes, too, of the pivot's every token."""
    a = pair[0]
    for part in align_spans(a, a):
        assert part.tolist() == list(range(len(a) + 1))
    own, single = align_spans(a, np.ones(a.sum(), np.uint16))
    assert own.tolist() == list(range(len(a) + 1))
    assert single.tolist() == [0, *np.cumsum(a).tolist()]


def test_by_hand():
    starts_a, starts_b = align_spans([2, 1, 3], [1, 2, 3])
    assert starts_a.tolist() == [0, 2, 3] and starts_b.tolist() == [0, 2, 3]


def test_tokens_without_bytes_go_to_the_chunk_before():
    cases = {
        ((0, 2, 0, 3), (2, 3)): ([0, 3, 4], [0, 1, 2]),
        ((0, 0, 2), (1, 0, 1, 0)): ([0, 3], [0, 4]),
        ((2, 0), (2,)): ([0, 2], [0, 1]),
        ((0,), ()): ([0, 1], [0, 0]),
        ((), ()): ([0], [0]),
    }
    for (a, b), expected in cases.items():
        assert tuple(part.tolist() for part in align_spans(a, b)) == expected


def test_unsigned_lengths_do_not_overflow():
    lengths = np.full(3, 60000, np.uint16)
    assert align_spans(lengths, [180000])[0].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1, 2], [4], "lengths_a are of 3 bytes and lengths_b of 4"),
        ([1, -1], [0], "lengths_a has the length -1"),
        ([1], [2, -1], "lengths_b has the length -1"),
        ([1.0], [1], "lengths_a is float64 .* whole numbers"),
        ([[1]], [1], r"lengths_a is int64 \[1, 1\]"),
    ],
)
def test_refusals(a, b, message):
    with pytest.raises(ValueError, match=message):
        align_spans(a, b)


@pytest.mark.parametrize(
    ("source", "least", "begin"), [("qwen2.5", 0.987, 0.9996), ("mistral-small", 0.939, 0.983)]
)
def test_real_tokenizers(shared_data, source, least, begin):
    """So many of the tokens of 600 real replies are one to one, or begin a chunk."""
    from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer
    from megatron_infifpo.tokens.token_bytes import TokenBytes

    records = json.loads((shared_data / "dpo_en_demo.json").read_text(encoding="utf-8"))
    texts = [record[side]["value"] for record in records for side in ("chosen", "rejected")]
    read = []
    for name in ("phi-4", source):
        tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
        token_bytes = TokenBytes(tokenizer)
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert all(token_bytes.join(i) == t.encode() for i, t in zip(ids, texts, strict=True))
        read.append([token_bytes.lengths[i] for i in ids])
    single = begins = total = 0
    for a, b in zip(*read, strict=True):
        counts = [np.diff(part) for part in align_spans(a, b)]
        single += int(((counts[0] == 1) & (counts[1] == 1)).sum())
        begins, total = begins + len(counts[0]), total + len(a)
    print(
        f"\nphi-4 <- {source}: of {total} tokens {single / total:.4%} one to one, "
        f"{begins / total:.4%} begin a chunk"
    )
    assert single / total >= least and begins / total >= begin
