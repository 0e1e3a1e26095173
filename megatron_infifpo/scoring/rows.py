"""From the records of a shard to packed rows, and from the rows' log-probs back to the records.

Everything here is planned from the shard alone, never from the ranks that score it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.logprobs import TopLogprobs
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.references.top_k import Packed
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.plan import fill
from megatron_infifpo.rows.preference_dataset import PreferencePair
from megatron_infifpo.scoring.top_k import Text, TopKeeper, observed
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
        plan: the records of each row; masked ones are in none, and one whose responses have rows
            of their own is in several.
        rows: the packed rows.
        keeper: of the most probable tokens; None: they are not asked for.
        texts: with `keeper`, those of the responses of each record that is scored.
    """

    number: int
    records: Sequence[PreferenceRecord]
    notes: list[str | None]
    remarks: list[tuple[str, ...]]
    plan: list[list[int]]
    rows: list[Row]
    keeper: TopKeeper | None = None
    texts: dict[int, list[Text]] = field(default_factory=dict)

    def unpack(self, outputs: Sequence[Tensor | TopLogprobs]) -> list[list[np.ndarray]]:
        """Return float32 log-probs by record and response from the rows' outputs."""
        results = [[np.zeros(0, np.float32)] * len(r.responses) for r in self.records]
        for index, r, found in self._split([observed(output).float() for output in outputs]):
            results[index][r] = found
        return results

    def unpack_top(self, outputs: Sequence[TopLogprobs]) -> list[list[Packed]]:
        """Return the most probable tokens by record and response; of masked records nothing."""
        assert self.keeper is not None
        results: list[dict[int, Packed]] = [{} for _ in self.records]
        ids = self._split([output.top_ids for output in outputs])
        logps = self._split([output.logprobs[:, 1:].float() for output in outputs])
        for (index, r, its_ids), (_, _, its_logps) in zip(ids, logps, strict=True):
            results[index][r] = self.keeper.pack(r, its_ids, its_logps, self.texts[index][r])
        return [[packed for _, packed in sorted(found.items())] for found in results]

    def _split(self, values: Sequence[Tensor]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield record and number of every response with what it has of the rows' `[K, ...]`."""
        for indices, row, of_row in zip(self.plan, self.rows, values, strict=True):
            pieces = of_row.split(row["token_counts"].flatten().tolist())
            places = itertools.product(indices, range(row["valid"].shape[1]))
            there = row["valid"].flatten().tolist()
            for (index, r), piece in itertools.compress(zip(places, pieces, strict=True), there):
                yield index, r, piece.numpy()


def prepare_shard(
    number: int,
    records: Sequence[PreferenceRecord],
    tokenizer: ChatTokenizer,
    limits: Limits,
    *,
    vocab_size: int,
    row_tokens: int,
    layout: RowLayout,
    max_row_tokens: int | None = None,
    keeper: TopKeeper | None = None,
) -> ShardRows:
    """Tokenize, mask and pack the records of a shard; flags as in `ScoringJob`.

    Raises:
        UserError: the tokenizer makes ids that the model does not have.
    """
    notes = [limits.other_domain(record) for record in records]
    taken = [i for i, note in enumerate(notes) if note is None]
    remarks: list[tuple[str, ...]] = [()] * len(records)
    pairs: list[PreferencePair] = []
    texts: dict[int, list[Text]] = {}
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
            pair = PreferencePair(i, tokens.prompt_ids, (*ids, *lacks), scored=marks)
            too_long = max_row_tokens is not None and _tokens(pair, layout) > max_row_tokens
            pairs += _one_by_one(pair) if too_long else [pair]
            if keeper is not None:
                texts[i] = keeper.texts(records[i], tokens)
    lengths = np.array([_tokens(pair, layout) for pair in pairs], np.int64)
    most = min(row_tokens, max_row_tokens or row_tokens)
    plan = [[pairs[i] for i in row] for row in fill(lengths, most)]
    rows = [collate(row, layout) for row in plan]
    for row, its_pairs in zip(rows, plan, strict=True):
        row["record_ids"] = [records[pair.index].id for pair in its_pairs]  # for errors
    if keeper is not None:
        keeper.ask(rows)
    indices = [[pair.index for pair in row] for row in plan]
    return ShardRows(number, records, notes, remarks, indices, rows, keeper, texts)


def _tokens(pair: PreferencePair, layout: RowLayout) -> int:
    """Tokens of a record in a row."""
    lengths = [len(ids) for ids in pair.response_ids if len(ids)]
    return layout.pair_tokens(len(pair.prompt_ids), sum(lengths), len(lengths))


def _one_by_one(pair: PreferencePair) -> Iterator[PreferencePair]:
    """Yield a record once for each of its responses, with that one alone."""
    none, unmarked = np.empty(0, np.int32), np.empty(0, bool)
    for r, ids in enumerate(pair.response_ids):
        if len(ids):
            alone = tuple(ids if k == r else none for k in range(len(pair.response_ids)))
            marks = pair.scored and tuple(
                mark if k == r else unmarked for k, mark in enumerate(pair.scored)
            )
            yield replace(pair, response_ids=alone, scored=marks)


def _check_ids(
    record: PreferenceRecord, tokens: TokenizedRecord, tokenizer: ChatTokenizer, vocab_size: int
) -> None:
    highest = max(int(ids.max()) for ids in (tokens.prompt_ids, *tokens.response_ids))
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.path} gives record {record.id!r} the token {highest}, but "
            f"the model has {vocab_size} tokens: it is another model's tokenizer"
        )
