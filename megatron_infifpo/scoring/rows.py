"""From the records of a shard to packed rows, and from the rows' log-probs back to the records.

Everything here is planned from the shard alone, never from the ranks that score it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.plan import fill
from megatron_infifpo.rows.preference_dataset import PreferencePair
from megatron_infifpo.tokens.encoding import encode_or_refuse
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord


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

    def other_domain(self, record: PreferenceRecord) -> str | None:
        """Say why the record's domain is not scored; None if it is."""
        if self.domains is None or record.domain in self.domains:
            return None
        return self.outside

    @property
    def outside(self) -> str:
        """Why records of other domains are masked."""
        return f"outside the domains {', '.join(self.domains or ())}"

    def apply(self, tokens: TokenizedRecord) -> tuple[TokenizedRecord | None, str | None]:
        """Return what of a record is scored, if anything, and what became of it, if anything."""
        room = self.context_length - len(tokens.prompt_ids)
        if max(len(ids) for ids in tokens.response_ids) <= room:
            return tokens, None
        too_long = f"longer than the context of {self.context_length} tokens"
        if not self.cut or room < 1:
            return None, too_long
        scored = tokens.scored and tuple(mark[:room] for mark in tokens.scored)
        if scored and not all(mark.any() for mark in scored):
            return None, too_long  # what is scored lies behind what is left
        ids = tuple(ids[:room] for ids in tokens.response_ids)
        cut = f"responses cut to the context of {self.context_length} tokens"
        return TokenizedRecord(tokens.prompt_ids, ids, scored), cut


@dataclass
class ShardRows:
    """A shard, ready to be scored.

    Attributes:
        number: of the shard.
        records: what it is made of, `[N]`.
        notes: why each is masked or cut, `[N]`; None where all of it is scored.
        remarks: `TokenizedRecord.notes` of each, `[N]`.
        plan: the records of each row; masked ones are in none.
        rows: the packed rows.
    """

    number: int
    records: Sequence[PreferenceRecord]
    notes: list[str | None]
    remarks: list[tuple[str, ...]]
    plan: list[list[int]]
    rows: list[Row]

    def unpack(self, outputs: Sequence[Tensor]) -> list[list[np.ndarray]]:
        """Return float32 log-probs by record and response from the `[K]` of each row."""
        results = [[np.zeros(0, np.float32)] * len(r.responses) for r in self.records]
        for indices, row, logprobs in zip(self.plan, self.rows, outputs, strict=True):
            counts = row["token_counts"].flatten().tolist()
            pieces = iter(logprobs.float().split(counts))
            for index in indices:
                found = [next(pieces).numpy() for _ in range(row["token_counts"].shape[1])]
                results[index] = found[: len(self.records[index].responses)]
        return results


def prepare_shard(
    number: int,
    records: Sequence[PreferenceRecord],
    tokenizer: ChatTokenizer,
    limits: Limits,
    *,
    vocab_size: int,
    row_tokens: int,
    layout: RowLayout,
) -> ShardRows:
    """Tokenize, mask and pack the records of a shard.

    Raises:
        UserError: the tokenizer makes ids that the model does not have.
    """
    notes = [limits.other_domain(record) for record in records]
    taken = [i for i, note in enumerate(notes) if note is None]
    remarks: list[tuple[str, ...]] = [()] * len(records)
    lengths = np.zeros(len(records), np.int64)
    pairs: dict[int, PreferencePair] = {}
    width = max(len(record.responses) for record in records)
    encoded = encode_or_refuse([records[i] for i in taken], tokenizer)
    for i, whole in zip(taken, encoded, strict=True):
        if isinstance(whole, str):
            notes[i] = whole
            continue
        _check_ids(records[i], whole, tokenizer, vocab_size)
        tokens, notes[i] = limits.apply(whole)
        if tokens is not None:
            ids, remarks[i] = tokens.response_ids, whole.notes
            lacks = (np.empty(0, np.int32),) * (width - len(ids))  # a row has as many of each
            marks = tokens.scored and (*tokens.scored, *(np.empty(0, bool) for _ in lacks))
            pairs[i] = PreferencePair(i, tokens.prompt_ids, (*ids, *lacks), scored=marks)
            prompt = len(tokens.prompt_ids)
            lengths[i] = layout.pair_tokens(prompt, sum(map(len, ids)), len(ids))
    plan = fill(lengths, row_tokens)
    rows = [collate([pairs[i] for i in row], layout) for row in plan]
    return ShardRows(number, records, notes, remarks, plan, rows)


def _check_ids(
    record: PreferenceRecord, tokens: TokenizedRecord, tokenizer: ChatTokenizer, vocab_size: int
) -> None:
    highest = max(int(ids.max()) for ids in (tokens.prompt_ids, *tokens.response_ids))
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} gives record {record.id!r} the token {highest}, but "
            f"the model has {vocab_size} tokens: it is another model's tokenizer"
        )
