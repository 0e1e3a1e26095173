"""Soft targets in a row: those of its responses, one after the other."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_infifpo.references.soft_targets import SoftTargets
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import ranges


def collate_targets(targets: Sequence[SoftTargets], groups: list[np.ndarray] | None) -> Row:
    """Join soft targets of responses as their scored tokens follow each other, K in all.

    Args:
        targets: of each response.
        groups: the groups of ids that they name; None if they name none.

    Returns:
        soft_ids int64 `[K, m]`, -1 for none; soft_probs float32 `[K, k]`, soft_tail float32 `[K]`
        and soft_sources int64 `[K]`; with groups soft_buckets int64 `[K, m]`, which of the k
        targets an id counts for, -1 for none; else m is k. Of C chunks, n tokens in all,
        chunk_rows and chunk_of int64 `[n]`, a token and the chunk that it is of, chunk_starts
        int64 `[C]`, chunk_logps and chunk_weights float32 `[C]`. Or, where sources are not fused,
        top_values float32 `[K, M, k]` and own_top, k.
    """
    if targets[0].values is not None:
        values = np.concatenate([each.values for each in targets if each.values is not None])
        return {"top_values": torch.from_numpy(values), "own_top": values.shape[-1]}
    starts = np.cumsum([0, *(len(each.ids) for each in targets)])
    parts = zip(targets, starts[:-1], strict=True)
    chunks = np.concatenate([each.chunks + start for each, start in parts]).astype(np.int64)
    sizes = chunks[:, 1] - chunks[:, 0]
    joined = {
        "soft_ids": np.concatenate([each.ids for each in targets]).astype(np.int64),
        "soft_probs": np.concatenate([each.probs for each in targets]),
        "soft_tail": np.concatenate([each.tail for each in targets]),
        "soft_sources": np.concatenate([each.sources for each in targets]).astype(np.int64),
        "chunk_rows": ranges(chunks[:, 0], sizes),
        "chunk_of": np.repeat(np.arange(len(chunks)), sizes),
        "chunk_starts": chunks[:, 0].copy(),
        "chunk_logps": np.concatenate([each.chunk_logps for each in targets]),
        "chunk_weights": np.concatenate([each.chunk_weights for each in targets]),
    }
    if groups is not None:
        joined |= _expanded(joined["soft_ids"], groups)
    return {name: torch.from_numpy(array) for name, array in joined.items()}


def _expanded(ids: np.ndarray, groups: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Put the ids of a group in place of its number, as many columns as the longest row takes."""
    rows, k = ids.shape
    # The number of a group is -(id + 2): by -id, ids of none, then of each group.
    sizes = np.array([0, 0, *map(len, groups)])
    counts = np.where(ids >= 0, 1, sizes[np.maximum(-ids, 0)]).ravel()
    pool = np.concatenate([*groups, ids.ravel()]).astype(np.int64)
    begins = np.cumsum(sizes) - sizes
    single = np.arange(ids.size) + sizes.sum()
    begin = np.where(ids.ravel() >= 0, single, begins[np.maximum(-ids, 0)].ravel())
    found = pool[ranges(begin, counts)]
    entry = np.repeat(np.arange(ids.size), counts)
    width = counts.reshape(rows, k).sum(axis=1)
    column = np.arange(len(entry)) - np.repeat(np.cumsum(width) - width, width)
    expanded = np.full((2, rows, max(1, int(width.max(initial=0)))), -1, np.int64)
    expanded[:, entry // k, column] = found, entry % k
    return {"soft_ids": expanded[0], "soft_buckets": expanded[1]}
