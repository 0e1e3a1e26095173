"""From the records of a shard to packed rows, and from the rows' log-probs back to the records.

Everything here is planned from the shard alone, never from the ranks that score it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_infifpo.cli import UserError
from megatron_infifpo.data import Row
from megatron_infifpo.data.packing import collate
from megatron_infifpo.data.preference_dataset import PreferencePair
from megatron_infifpo.data.records import PreferenceRecord
from megatron_infifpo.data.tokenization import (
    ChatTokenizer,
    RefusedPromptError,
    TokenizedRecord,
)

# What became of a record.
SCORED, TOO_LONG, CUT, OTHER_DOMAIN, REFUSED = range(5)
MASKED = (TOO_LONG, OTHER_DOMAIN, REFUSED)


@dataclass(frozen=True)
class Limits:
    """What a model takes of a record.

    Attributes:
        context_length: tokens of a prompt with one response.
        cut: cut a response that is longer, else mask the record.
        domains: the domains to score; None means all.
    """

    context_length: int
    cut: bool = False
    domains: Sequence[str] | None = None

    def note(self, code: int) -> str | None:
        """Say in words what became of a record."""
        if code == TOO_LONG:
            return f"longer than the context of {self.context_length} tokens"
        if code == CUT:
            return f"responses cut to the context of {self.context_length} tokens"
        if code == OTHER_DOMAIN:
            return f"outside the domains {', '.join(self.domains or ())}"
        if code == REFUSED:
            return "the chat template refuses its prompt"
        return None

    def take(self, record: PreferenceRecord) -> bool:
        """Whether the record's domain is scored."""
        return self.domains is None or record.domain in self.domains

    def apply(self, tokens: TokenizedRecord) -> tuple[int, TokenizedRecord | None]:
        """Return what becomes of a record, and what of it is scored, if anything."""
        room = self.context_length - len(tokens.prompt_ids)
        if max(len(ids) for ids in tokens.response_ids) <= room:
            return SCORED, tokens
        if not self.cut or room < 1:
            return TOO_LONG, None
        ids = tuple(ids[:room] for ids in tokens.response_ids)
        return CUT, TokenizedRecord(tokens.prompt_ids, ids)


@dataclass
class ShardRows:
    """A shard, ready to be scored.

    Attributes:
        number: of the shard.
        records: what it is made of, `[N]`.
        notes: what became of each, `[N]`.
        plan: the records of each row; masked ones are in none.
        rows: the packed rows.
    """

    number: int
    records: Sequence[PreferenceRecord]
    notes: np.ndarray
    plan: list[list[int]]
    rows: list[Row]

    def unpack(self, outputs: Sequence[Tensor]) -> list[list[np.ndarray]]:
        """Return float32 log-probs by record and response from the `[K]` of each row."""
        responses = len(self.records[0].responses)
        results = [[np.zeros(0, np.float32)] * responses for _ in self.records]
        for indices, row, logprobs in zip(self.plan, self.rows, outputs, strict=True):
            counts = row["token_counts"].flatten().tolist()
            pieces = iter(logprobs.float().split(counts))
            for index in indices:
                results[index] = [next(pieces).numpy() for _ in range(responses)]
        return results


def prepare_shard(
    number: int,
    records: Sequence[PreferenceRecord],
    tokenizer: ChatTokenizer,
    limits: Limits,
    *,
    vocab_size: int,
    row_tokens: int,
    pad_multiple: int,
    share_prompt: bool = False,
) -> ShardRows:
    """Tokenize, mask and pack the records of a shard.

    Raises:
        UserError: the tokenizer makes ids that the model does not have.
    """
    taken = [i for i, record in enumerate(records) if limits.take(record)]
    notes, lengths = np.full(len(records), OTHER_DOMAIN, np.int8), np.zeros(len(records), np.int64)
    pairs: dict[int, PreferencePair] = {}
    for i, whole in zip(taken, _encode([records[i] for i in taken], tokenizer), strict=True):
        if whole is None:
            notes[i] = REFUSED
            continue
        _check_ids(records[i], whole, tokenizer, vocab_size)
        notes[i], tokens = limits.apply(whole)
        if tokens is not None:
            pairs[i] = PreferencePair(i, tokens.prompt_ids, tokens.response_ids)
            copies = 1 if share_prompt else len(tokens.response_ids)
            lengths[i] = copies * len(tokens.prompt_ids) + sum(map(len, tokens.response_ids))
    plan = plan_rows(lengths, row_tokens)
    rows = [
        collate([pairs[i] for i in row], pad_multiple=pad_multiple, share_prompt=share_prompt)
        for row in plan
    ]
    return ShardRows(number, records, notes, plan, rows)


def _encode(
    records: Sequence[PreferenceRecord], tokenizer: ChatTokenizer
) -> list[TokenizedRecord | None]:
    """Tokenize; None for a record whose prompt the chat template refuses."""
    if not records:
        return []
    try:
        return [*tokenizer.encode_batch(records)]
    except RefusedPromptError:
        if len(records) == 1:
            return [None]
        return [tokens for record in records for tokens in _encode([record], tokenizer)]


def _check_ids(
    record: PreferenceRecord, tokens: TokenizedRecord, tokenizer: ChatTokenizer, vocab_size: int
) -> None:
    highest = max(int(ids.max()) for ids in (tokens.prompt_ids, *tokens.response_ids))
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} gives record {record.id!r} the token {highest}, but "
            f"the model has {vocab_size} tokens: it is another model's tokenizer"
        )


def plan_rows(lengths: np.ndarray, token_budget: int) -> list[list[int]]:
    """Pack records into rows of at most `token_budget` tokens, longest first.

    Args:
        lengths: `[N]` tokens of each record (all its responses, each with its prompt); records of
            length 0 are masked and left out.
        token_budget: tokens of a row; a longer record gets a row of its own.

    Returns:
        Record indices by row.
    """
    rows: list[list[int]] = []
    used = token_budget + 1
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if length == 0:
            break
        if used + length > token_budget:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += length
    return rows
