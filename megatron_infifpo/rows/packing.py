"""Pack pairs into a row: one sequence of whole responses, each with its prompt.

`[prompt chosen_1 | prompt rejected_1 | prompt chosen_2 | ...]`: every response is an attention
segment with its own copy of the prompt, or with one copy for all of its pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from megatron_infifpo.references import reference
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import PLAIN, RowLayout, ranges
from megatron_infifpo.rows.pieces import borders
from megatron_infifpo.rows.preference_dataset import PreferencePair
from megatron_infifpo.rows.soft_targets import collate_targets
from megatron_infifpo.tokens.encoding import scored_marks


def collate(pairs: Sequence[PreferencePair], layout: RowLayout = PLAIN) -> Row:
    """Pack pairs into one row.

    B pairs, R responses, S segments, one for each response that is there, K scored tokens, T tokens
    of the row.

    Args:
        pairs: B of them, all with R responses or empty places of such, and the same sources.
        layout: of the row. Where T is padded, the tail is an attention segment of its own, of
            token 0, and never scored. With shared prompts, `[prompt chosen | rejected]`, the
            segments of the other responses have the prompt's keys and values beside their own.

    Returns:
        tokens int64 `[1, T]`; position_ids int64 `[1, T]`, in the text that a token is of;
        cu_seqlens int32 `[S + 1]` (one more with a tail), the same as a list segment_lengths `[S]`,
        max_seqlen int; scored_rows int64 `[K]`, positions whose hidden state predicts a scored
        token; target_ids int64 `[K]`, those tokens; segment_ids int64 `[K]`, b * R + r;
        token_counts int64 `[B, R]`, scored ones; valid bool `[B, R]`, which responses are there;
        ended bool `[B, R]`, whether their last token, the end of the turn, is scored; rewards
        float64 `[B, R]`, and pair_weights float32 `[B]`, where there are some; indices and
        domain_codes int64 `[B]`; stored values of models, where there are some, as
        `references.reference.collate` makes them; soft targets, where there are some, as
        `soft_targets.collate_targets` does, of rows with R = 1; and with shared prompts the
        segments of the keys, cu_seqlens_kv int32 `[S + 1]`, key_lengths, max_seqlen_kv int, and
        key_rows int64 `[T_kv]`, where they lie in the row.
    """
    marks = [mark for pair in pairs for mark in scored_marks(pair.response_ids, pair.scored)]
    counts, scored = [int(mark.sum()) for mark in marks], np.concatenate(marks)
    segments = _Segments()
    for pair in pairs:
        segments.add(pair, layout.share_prompt)
    if tail := layout.padding(segments.total):
        segments.pad(tail)
    targets = np.concatenate([ids for pair in pairs for ids in pair.response_ids])
    row: Row = {
        "tokens": torch.from_numpy(np.concatenate(segments.tokens).astype(np.int64))[None],
        "position_ids": torch.from_numpy(_joined(segments.positions))[None],
        "cu_seqlens": borders(segments.queries),
        "max_seqlen": max(segments.queries),
        "segment_lengths": segments.queries,
        "scored_rows": torch.from_numpy(_joined(segments.predicting)[scored]),
        "target_ids": torch.from_numpy(targets[scored].astype(np.int64)),
        "segment_ids": torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
        "token_counts": torch.tensor(counts, dtype=torch.int64).view(len(pairs), -1),
        "valid": torch.tensor([len(mark) > 0 for mark in marks]).view(len(pairs), -1),
        "ended": torch.tensor([bool(mark[-1:].any()) for mark in marks]).view(len(pairs), -1),
        "indices": torch.tensor([pair.index for pair in pairs], dtype=torch.int64),
        "domain_codes": torch.tensor([pair.domain_code for pair in pairs], dtype=torch.int64),
    }
    if layout.share_prompt:
        row |= segments.of_keys()
    if rewards := [pair.rewards for pair in pairs if pair.rewards is not None]:
        row["rewards"] = torch.from_numpy(np.stack(rewards))
    if weights := [pair.weight for pair in pairs if pair.weight is not None]:
        row["pair_weights"] = torch.tensor(weights, dtype=torch.float32)
    if pairs[0].values is not None:
        row |= reference.collate([pair.values for pair in pairs if pair.values is not None])
    if soft := [pair.targets for pair in pairs if pair.targets is not None]:
        row |= collate_targets(soft, pairs[0].groups)
    return row


def collate_text(
    prompt_ids: np.ndarray, response_ids: np.ndarray, layout: RowLayout = PLAIN
) -> Row:
    """Make a row of one prompt and one response, all of whose tokens are scored."""
    return collate([PreferencePair(0, prompt_ids, (response_ids,))], layout)


def pin(row: Row) -> Row:
    """Put a row into memory from which copying it to a GPU waits for nothing."""
    return {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in row.items()}


@dataclass
class _Segments:
    """The segments of a row, in order; pieces are ranges `(start, length)`.

    Attributes:
        tokens: of the row, piece by piece.
        queries: tokens of each segment.
        keys: tokens of each segment's keys.
        positions: in the text, by segment.
        key_rows: where the keys lie in the row.
        predicting: positions that predict a response token, scored or not.
    """

    tokens: list[np.ndarray] = field(default_factory=list)
    queries: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    positions: list[tuple[int, int]] = field(default_factory=list)
    key_rows: list[tuple[int, int]] = field(default_factory=list)
    predicting: list[tuple[int, int]] = field(default_factory=list)
    total: int = 0

    def add(self, pair: PreferencePair, share_prompt: bool) -> None:
        """Append a pair's segments, with one prompt or with one for each response."""
        prompt = len(pair.prompt_ids)
        for r, ids in enumerate(filter(len, pair.response_ids)):
            shared = share_prompt and r > 0
            if not shared:
                begin = self.total  # of the prompt that this response has
            self.tokens += [ids] if shared else [pair.prompt_ids, ids]
            self._append(len(ids) if shared else prompt + len(ids), prompt if shared else 0)
            self.keys.append(prompt + len(ids))
            own = self.total - len(ids)
            self.key_rows += [(begin, prompt), (own, len(ids))]
            # Hidden row t predicts token t + 1, and the prompt's last one the first of a response.
            self.predicting += [(begin + prompt - 1, 1), (own, len(ids) - 1)]

    def pad(self, count: int) -> None:
        """Append a tail that is never scored."""
        self.tokens.append(np.zeros(count, np.int64))
        self.keys.append(count)
        self.key_rows.append((self.total, count))
        self._append(count, 0)

    def of_keys(self) -> Row:
        """Return what a row says of the segments' keys."""
        return {
            "cu_seqlens_kv": borders(self.keys),
            "max_seqlen_kv": max(self.keys),
            "key_lengths": self.keys,
            "key_rows": torch.from_numpy(_joined(self.key_rows)),
        }

    def _append(self, length: int, position: int) -> None:
        self.queries.append(length)
        self.positions.append((position, length))
        self.total += length


def _joined(pieces: Sequence[tuple[int, int]]) -> np.ndarray:
    """Return start ... start + length - 1 for each piece, joined, int64."""
    return ranges(*np.array(pieces).T)
