"""Tokenize records; a record that cannot be scored comes back as the reason."""

from collections.abc import Sequence

import numpy as np

from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.storage.notes import one_line
from megatron_infifpo.tokens.tokenization import ChatTokenizer, RefusedRecordError, TokenizedRecord


def encode_or_refuse(
    records: Sequence[PreferenceRecord], tokenizer: ChatTokenizer
) -> list[TokenizedRecord | str]:
    """Tokenize records; one that cannot be scored gives a text that says why, without its id."""
    if not records:
        return []
    try:
        found = tokenizer.encode_batch(records)
        return [_checked(*both) for both in zip(records, found, strict=True)]
    except RefusedRecordError as error:
        if len(records) == 1:
            return [one_line(f"the chat template refuses it: {error.reason}")]
    # Halves: where few are refused, most records are tokenized in large batches still.
    middle = len(records) // 2
    return [
        found
        for half in (records[:middle], records[middle:])
        for found in encode_or_refuse(half, tokenizer)
    ]


def scored_marks(
    response_ids: Sequence[np.ndarray], scored: Sequence[np.ndarray] | None
) -> Sequence[np.ndarray]:
    """Return bool `[L_r]` for each response: which tokens are scored, where None means all."""
    return scored or [np.ones(len(ids), dtype=bool) for ids in response_ids]


def _checked(record: PreferenceRecord, tokens: TokenizedRecord) -> TokenizedRecord | str:
    """Refuse what has no mean log-prob, or a first token that nothing predicts."""
    if not len(tokens.prompt_ids):
        return "its prompt has no tokens, and nothing predicts the first token of a response"
    marks = scored_marks(tokens.response_ids, tokens.scored)
    for name, ids, mark in zip(record.names, tokens.response_ids, marks, strict=True):
        assert len(mark) == len(ids), f"{len(mark)} marks of {len(ids)} tokens"
        if not mark.any():
            return f"no token of {name!r} is scored"
    return tokens
