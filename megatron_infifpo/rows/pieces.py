"""Cut a row for context parallelism: which of its tokens a rank holds, and which keys they see.

Every attention segment is cut into twice as many chunks as there are ranks, and a rank has one
chunk of the segment's first half and its mirror image of the second: early tokens see few keys and
late ones many, so all ranks have the same work. A rank gathers the keys and values of the whole
row; a chunk is then a segment like any other, whose keys are its text up to its own end.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_infifpo.rows import Row

_Piece = tuple[int, int, int]  # segment, begin in it, end


def cut(row: Row, ranks: int, rank: int) -> Row:
    """Return what of a row a rank of context parallelism computes; T tokens, a multiple of `ranks`.

    Args:
        row: whole, as `packing.collate` makes it with a `RowLayout` of so many ranks.
        ranks: that share the row.
        rank: which of them.

    Returns:
        The row, with tokens, position_ids, cu_seqlens, max_seqlen and segment_lengths of the
        rank's `[T / ranks]` tokens; cu_seqlens_kv, max_seqlen_kv, key_lengths and key_rows, the
        keys of its segments among the rows that all ranks hold, joined in their order; scored_rows
        `[k]`, positions among its own of those that predict a scored token; and scored_places int64
        `[k]`, which of the row's K these are. What is said of scored tokens and of responses
        remains that of the whole row.
    """
    if ranks == 1:
        return row
    whole, queries = _keys(row), row["segment_lengths"]
    pieces = _pieces(queries, ranks)
    begins = np.cumsum([0, *queries])
    # Where every token of the row lies once the ranks' shares are joined.
    order = np.concatenate(
        [np.arange(begins[s] + a, begins[s] + b) for share in pieces for s, a, b in share]
    )
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    size = len(order) // ranks
    mine = torch.from_numpy(order[rank * size : (rank + 1) * size])
    # What a piece sees ends where it does: without the keys of the queries after it.
    keys = [whole[s][: len(whole[s]) - (queries[s] - end)] for s, _, end in pieces[rank]]
    lengths = [end - begin for _, begin, end in pieces[rank]]
    scored = place[row["scored_rows"].numpy()]
    held = np.flatnonzero(scored // size == rank)
    return row | {
        "tokens": row["tokens"][:, mine],
        "position_ids": row["position_ids"][:, mine],
        "cu_seqlens": borders(lengths),
        "max_seqlen": max(lengths),
        "segment_lengths": lengths,
        "cu_seqlens_kv": borders([len(k) for k in keys]),
        "max_seqlen_kv": max(map(len, keys)),
        "key_lengths": [len(k) for k in keys],
        "key_rows": torch.from_numpy(place[np.concatenate(keys)]),
        "scored_rows": torch.from_numpy(scored[held] - rank * size),
        "scored_places": torch.from_numpy(held),
    }


def borders(lengths: Sequence[int]) -> torch.Tensor:
    """Return where segments of these lengths begin and end, int32 `[S + 1]`."""
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))


def _keys(row: Row) -> list[np.ndarray]:
    """Where the keys of each segment of a whole row lie in it."""
    lengths: list[int] = row["key_lengths" if "key_lengths" in row else "segment_lengths"]
    rows = row["key_rows"].numpy() if "key_rows" in row else np.arange(sum(lengths))
    return np.split(rows, np.cumsum(lengths)[:-1])


def _pieces(lengths: Sequence[int], ranks: int) -> list[list[_Piece]]:
    """Return every rank's pieces of segments of these lengths, the last of which is the tail.

    Where a text is cut follows from its length alone: its numbers do not depend, in no precision,
    on what else is in the row. Ranks then differ by two tokens at most, and the tail makes up.
    """
    shares: list[list[_Piece]] = [[] for _ in range(ranks)]
    loads, chunks = [0] * ranks, 2 * ranks
    for segment, length in enumerate(lengths[:-1]):
        ends = [length * chunk // chunks for chunk in range(chunks + 1)]
        # An early chunk and its mirror image: the most tokens go to the rank that has the fewest.
        both = [(ends[c : c + 2], ends[chunks - 1 - c : chunks + 1 - c]) for c in range(ranks)]
        both.sort(key=lambda pair: sum(a - b for a, b in pair))
        for rank, pair in zip(sorted(range(ranks), key=loads.__getitem__), both, strict=True):
            for begin, end in pair:
                loads[rank] += end - begin
                if end > begin:
                    shares[rank].append((segment, begin, end))
    size, begin = sum(lengths) // ranks, 0
    for rank, load in enumerate(loads):
        assert load <= size, "the row was not made for so many ranks"
        if load < size:
            shares[rank].append((len(lengths) - 1, begin, begin + size - load))
        begin += size - load
    return shares
