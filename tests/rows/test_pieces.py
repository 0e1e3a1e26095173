"""Rows cut over ranks: nothing is lost, every token sees its text, all have the same work."""

import numpy as np
import pytest
import torch

from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.pieces import cut
from megatron_infifpo.rows.preference_dataset import PreferencePair


def pairs(count: int, longest: int, responses: int = 2) -> list[PreferencePair]:
    """Pairs of random lengths, in which every token of a text is another one."""
    dice = np.random.default_rng([count, longest, responses])
    ids = iter(np.split(np.arange(1, 100_001), 1000))

    def text() -> np.ndarray:
        return next(ids)[: dice.integers(1, longest + 1)]

    return [
        PreferencePair(i, text(), tuple(text() for _ in range(responses))) for i in range(count)
    ]


CUTS = [(ranks, share) for ranks in (2, 3, 4, 8) for share in (False, True)]


@pytest.mark.parametrize(("ranks", "share"), CUTS)
@pytest.mark.parametrize("longest", [3, 80])
def test_every_piece_sees_its_text(ranks, share, longest):
    """Short texts, too, of which most ranks have nothing."""
    layout = RowLayout(2, 1, share, ranks)
    whole = collate(pairs(4, longest), layout)
    parts = [cut(whole, ranks, rank) for rank in range(ranks)]
    size = whole["tokens"].numel() // ranks
    assert all(part["tokens"].shape == (1, size) and size % 2 == 0 for part in parts)
    joined, positions = (
        torch.cat([part[name] for part in parts], dim=1).flatten()
        for name in ("tokens", "position_ids")
    )
    assert torch.equal(joined.sort().values, whole["tokens"].flatten().sort().values)
    for part in parts:
        queries, keys = part["segment_lengths"], part["key_lengths"]
        assert min(queries) > 0 and sum(queries) == size
        assert part["cu_seqlens"].tolist() == np.cumsum([0, *queries]).tolist()
        assert part["cu_seqlens_kv"].tolist() == np.cumsum([0, *keys]).tolist()
        assert (part["max_seqlen"], part["max_seqlen_kv"]) == (max(queries), max(keys))
        seen, own = part["key_rows"].split(keys), part["tokens"].flatten().split(queries)
        for rows, mine in zip(seen, own, strict=True):
            assert positions[rows].tolist() == list(range(len(rows)))
            assert torch.equal(joined[rows][-len(mine) :], mine)


@pytest.mark.parametrize(("ranks", "share"), CUTS)
def test_every_scored_token_is_on_one_rank(ranks, share):
    whole = collate(pairs(3, 40, responses=3), RowLayout(1, 1, share, ranks))
    parts = [cut(whole, ranks, rank) for rank in range(ranks)]
    places = torch.cat([part["scored_places"] for part in parts])
    assert places.sort().values.tolist() == list(range(len(whole["target_ids"])))
    for part in parts:
        of_whole = whole["tokens"].flatten()[whole["scored_rows"][part["scored_places"]]]
        assert torch.equal(part["tokens"].flatten()[part["scored_rows"]], of_whole)
        for name in ("target_ids", "segment_ids", "token_counts"):
            assert torch.equal(part[name], whole[name]), name


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_equal_work(ranks):
    """(query, key) pairs of a long text: the same on all ranks, but for what does not divide."""
    long = PreferencePair(0, np.arange(1, 1001), (np.arange(2000), np.arange(1500)))
    whole = collate([long], RowLayout(1, 1, False, ranks))
    work = []
    for rank in range(ranks):
        part = cut(whole, ranks, rank)
        both = zip(part["segment_lengths"], part["key_lengths"], strict=True)
        work.append(sum(q * k - q * (q - 1) // 2 for q, k in both))
    assert sum(work) >= 3000 * 3001 // 2 + 2500 * 2501 // 2
    assert max(work) < 1.005 * min(work)
    # Keys that a rank selects: P + L (1 + 1 / (2 CP)) a segment.
    assert len(cut(whole, ranks, 0)["key_rows"]) == pytest.approx(
        (3000 + 2500) * (1 + 1 / (2 * ranks)), rel=0.01
    )


def test_one_rank_has_the_row_as_it_is():
    whole = collate(pairs(2, 9))
    assert cut(whole, 1, 0) is whole


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_text_is_cut_as_it_would_be_alone(ranks):
    """Whatever is before it: in bfloat16, too, a text then has the same numbers in every row."""
    many = pairs(6, 50)

    def ends(row: dict, tokens: set[int]) -> set[tuple[int, int]]:
        """First and last token of every piece of these tokens."""
        found = set()
        for rank in range(ranks):
            part = cut(row, ranks, rank)
            for piece in part["tokens"].flatten().split(part["segment_lengths"]):
                if int(piece[0]) in tokens:
                    found.add((int(piece[0]), int(piece[-1])))
        return found

    layout = RowLayout(1, 1, True, ranks)
    whole = collate(many, layout)
    for pair in many:
        texts = [pair.prompt_ids, *pair.response_ids]
        tokens = {int(token) for text in texts for token in text}
        assert ends(whole, tokens) == ends(collate([pair], layout), tokens)
