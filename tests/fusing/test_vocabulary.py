"""The map of a source's ids onto the pivot's: twins, numbers, classes, special tokens."""

import numpy as np
import pytest

from megatron_infifpo.fusing.vocabulary import AMBIGUOUS, TAIL, Vocabulary, map_vocabulary
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer
from megatron_infifpo.tokens.special_text import SpecialText
from megatron_infifpo.tokens.text_ids import TextIds
from megatron_infifpo.tokens.token_bytes import TokenBytes
from support.fusing import toy

# Numbers are whole tokens of the pivot; the source splits them.
PIVOT = ["2", "20", "201", "3", "the", "x", "0", "1", ""]
SOURCE = ["2", "0", "1", "3", "the", "x", "", ""]


def ids_of(source, pivot, ambiguous, size=0):
    return map_vocabulary(source, pivot, size, ambiguous).ids.tolist()


def test_modes_by_hand():
    source, pivot = toy(SOURCE), toy(PIVOT)
    assert ids_of(source, pivot, "id") == [0, 6, 7, 3, 4, 5, -1, -1]
    assert ids_of(source, pivot, "digits") == [-1, 6, 7, 3, 4, 5, -1, -1]
    assert ids_of(source, pivot, "tail") == [-1, 6, 7, 3, 4, 5, -1, -1]
    found = map_vocabulary(source, pivot, 0, "group")
    assert found.ids.tolist() == [-2, 6, 7, 3, 4, 5, -1, -1]
    assert [group.tolist() for group in found.groups] == [[0, 1, 2]]
    assert found.counts == {"ids": 8, "twins": 6, "ambiguous": 1, "mapped": 6}


def test_only_numbers_leave_by_default():
    """'.' stands for '.' and '.)' as '2' does for '2' and '20'; numbers alone go to the tail."""
    source, pivot = toy([".", ")", "2", "0"]), toy([".", ".)", ")", "2", "20", "0"])
    assert ids_of(source, pivot, "digits") == [0, 2, -1, 5]
    assert ids_of(source, pivot, "tail") == [-1, 2, -1, 5]
    found = map_vocabulary(source, pivot, 0, "group")
    assert found.ids.tolist() == [-2, 2, -3, 5]
    assert [group.tolist() for group in found.groups] == [[0, 1], [3, 4]]


def test_ids_without_a_twin():
    """'201' of a source begins with the pivot's '2', and so does what the pivot would write."""
    source, pivot = (
        toy(["2", "0", "1", "201", "the", "then", "?"]),
        toy(["2", "0", "1", "the", "n"]),
    )
    assert ids_of(source, pivot, "id") == [0, 1, 2, -1, 3, -1, -1]
    assert ids_of(source, pivot, "digits") == [0, 1, 2, 0, 3, -1, -1]  # numbers alone
    assert ids_of(source, pivot, "tail") == [0, 1, 2, 0, 3, 3, -1]
    assert ids_of(source, pivot, "group") == [0, 1, 2, 0, 3, 3, -1]


def test_classes_join_over_both_sides():
    """The pivot's 'abc' begins with the source's 'ab', which begins with the pivot's 'a'."""
    source, pivot = toy(["a", "ab", "b", "c"]), toy(["a", "abc", "b", "c"])
    found = map_vocabulary(source, pivot, 0, "group")
    assert found.ids.tolist() == [-2, -2, 2, 3]
    assert [group.tolist() for group in found.groups] == [[0, 1]]
    assert ids_of(source, pivot, "tail") == [-1, -1, 2, 3]


def test_classes_are_a_partition():
    """Of random vocabularies: each id of the pivot is in one class, groups do not overlap."""
    rng = np.random.default_rng(5)
    for _ in range(50):
        texts = ["".join(rng.choice(list("ab2"), rng.integers(1, 5))) for _ in range(24)]
        sides = [sorted({*"ab2", *rng.choice(texts, 12)}) for _ in range(2)]
        found = map_vocabulary(toy(sides[0]), toy(sides[1]), 0, "group")
        single = set(found.ids[found.ids >= 0].tolist())
        grouped = [number for group in found.groups for number in group.tolist()]
        assert len(set(grouped)) == len(grouped) and not single & set(grouped)
        assert single | set(grouped) == set(range(len(sides[1])))
        assert (found.ids != TAIL).all()  # every text begins with a token of the pivot


def test_padding_and_special_tokens():
    source = toy(["a", "", "", ""], end_of_turn=[2, 3])
    pivot = toy(["", "a", "", ""], end_of_turn=[3])
    for mode in AMBIGUOUS:
        assert ids_of(source, pivot, mode, size=7) == [1, -1, 3, -1, -1, -1, -1]
    # Where a turn ends with text, that is no special token of either.
    assert ids_of(source, toy(["", "a", "."], end_of_turn=[2]), "id") == [1, -1, -1, -1]


def test_one_vocabulary():
    """The pivot's own ids are kept, special ones, too; ids beyond the vocabulary are not."""
    one = Vocabulary([b"a", b"", b"b"], [1], toy(["a", "", "b"]).encode, identity="same")
    assert ids_of(one, one, "digits", size=5) == [0, 1, 2, -1, -1]


@pytest.mark.parametrize("piece", [b"", b"<end>"])
def test_one_vocabulary_and_two_ends_of_turn(piece):
    """What ends the source's turns is what ends the pivot's, and the pivot's own is neither."""
    pieces, encode = [b"a", b"", piece], toy(["a", "", ""]).encode
    pivot, source, silent = (
        Vocabulary(pieces, ends, encode, identity="same") for ends in ([1], [2], [])
    )
    assert ids_of(source, pivot, "digits", size=4) == [0, -1, 1, -1]
    assert ids_of(silent, pivot, "digits") == [0, 1, 2]
    # Where the pivot's turn ends with text, no id of the source's is that.
    words = Vocabulary(pieces, [0], encode, identity="same")
    assert ids_of(source, words, "digits") == [0, 1, 2]


def test_ids_by_bytes_are_found_once():
    """However many sources there are, the pivot's tokenizer is asked once for pieces that several
    of its ids have."""
    asked = []
    plain = toy([b"\n", b"a", b"\n"])

    def encode(texts):
        asked.extend(texts)
        return plain.encode(texts)

    pivot = Vocabulary(plain.pieces, [], encode)
    for _ in range(2):
        map_vocabulary(toy(["\n", "a"]), pivot, 0)
    assert asked.count("\n") == 1


def test_several_ids_of_one_text():
    """Byte fallback has ids of its own; the twin is the one that the tokenizer writes."""
    pivot = toy([b"\n", b"a", b"\n"])
    assert pivot.encode(["\n"]) == [[0]]
    assert pivot.by_bytes == {b"\n": 0, b"a": 1}
    source = toy([b"\n", b"\n", b"a"])
    for mode in AMBIGUOUS:
        assert ids_of(source, pivot, mode) == [0, 0, 1]


def test_blank_before_a_text():
    """SentencePiece puts a blank before a text, which is no part of the token."""
    plain = toy([" ", "\n", "2", "0", "a"])
    shy = Vocabulary(plain.pieces, [], lambda texts: plain.encode([" " + t for t in texts]))
    assert shy.ids_of([b"20", b"a", b"\xff", b"?"]) == [[2, 3], [4], [], []]
    assert ids_of(shy, toy([" ", "\n", "2", "20", "0", "a"]), "digits") == [0, 1, -1, 4, 5]


def test_permuted_ids():
    """Ids are names: another order of either vocabulary gives the same map."""
    rng = np.random.default_rng(0)
    for mode in AMBIGUOUS:
        here, there = rng.permutation(len(SOURCE)), rng.permutation(len(PIVOT))
        before = map_vocabulary(toy(SOURCE), toy(PIVOT), 0, mode)
        after = map_vocabulary(
            toy([SOURCE[i] for i in here]), toy([PIVOT[i] for i in there]), 0, mode
        )
        for new, old in enumerate(here.tolist()):
            assert members(after, new, there) == members(before, old, np.arange(len(PIVOT)))


def members(found, number, names):
    """The pivot's ids, by their old names, that an id is mapped to."""
    target = int(found.ids[number])
    if target == TAIL:
        return set()
    ids = [target] if target >= 0 else found.groups[-(target + 2)].tolist()
    return {int(names[i]) for i in ids}


def real(folder, name):
    tokenizer = load_tokenizer(folder / "tokenizers" / name)
    encode = TextIds(tokenizer, SpecialText(tokenizer)).ids
    return Vocabulary(TokenBytes(tokenizer).pieces, [], encode, name)


@pytest.fixture(scope="module")
def phi(shared_data):
    return real(shared_data, "phi-4")


def test_phi_and_qwen(shared_data, phi):
    """Exactly the ten digits are ambiguous, each for 111 tokens of Phi-4."""
    source = real(shared_data, "qwen2.5")
    found = map_vocabulary(source, phi, 152064, "group")
    several = [source.pieces[i] for i in np.flatnonzero(found.ids <= -2)]
    assert sorted(several) == [b"%d" % digit for digit in range(10)]
    assert [len(group) for group in found.groups] == [111] * 10
    assert found.counts["ambiguous"] == 10 and found.counts["twins"] == 99156
    digits = map_vocabulary(source, phi, 152064, "digits").ids
    plain = map_vocabulary(source, phi, 152064, "id").ids
    assert len(digits) == 152064 and (digits[len(source.pieces) :] == TAIL).all()
    assert (plain != digits).sum() == 10 and (digits[plain != digits] == TAIL).all()
    twins = np.flatnonzero(plain >= 0).tolist()
    assert all(source.pieces[i] == phi.pieces[plain[i]] for i in twins)


def test_phi_and_mistral(shared_data, phi):
    """Every id of Phi-4 that is whole characters is in one class."""
    found = map_vocabulary(real(shared_data, "mistral-small"), phi, 131072, "group")
    assert found.counts["twins"] == 56557
    assert max(map(len, found.groups)) == 1054
    grouped = np.concatenate(found.groups)
    placed = np.concatenate([np.unique(found.ids[found.ids >= 0]), grouped])
    assert len(np.unique(placed)) == len(placed)
    text = sum(1 for piece in phi.pieces if piece)
    assert text - len(placed) == 175  # parts of characters
