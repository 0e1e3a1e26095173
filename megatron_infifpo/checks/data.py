"""Check token and log-prob datasets against the records that they were made from, value by value.

Opening a dataset compares counts and fingerprints; this reads everything, and tokenizes again.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import (
    PreferenceRecord,
    iter_records,
    records_fingerprint,
)
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.storage.notes import noted
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import encode_or_refuse, scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

BATCH = 256
_ROUNDING = 1e-6  # of a float64 sum of float32 values, relative


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: in a few words.
        error: what is wrong, or None.
        note: what was found where nothing is wrong.
    """

    what: str
    error: str | None = None
    note: str = ""


def attempt(what: str, check: Callable[[], str]) -> Check:
    """Run one check; it returns what it found, or raises."""
    try:
        return Check(what, note=check())
    except UserError as error:
        return Check(what, str(error))


def read_source_records(tokens: TokenDataset, files: Sequence[str]) -> list[PreferenceRecord]:
    """Read the records that a token dataset was made from.

    Raises:
        UserError: they are gone, or are not the ones.
    """
    paths = list(files) or tokens.manifest["source_files"]
    records = list(iter_records(paths, on_bad="skip"))
    found = records_fingerprint(records)
    if found != tokens.records_sha256:
        raise UserError(
            f"{', '.join(map(str, paths))} has {len(records)} records of fingerprint {found[:12]}, "
            f"expected {len(tokens)} of {tokens.records_sha256[:12]}: the file has changed since "
            f"{tokens.prefix} was written"
        )
    return records


def check_tokens(tokens: TokenDataset, records: Sequence[PreferenceRecord]) -> str:
    """Tokenize every record again and compare ids, what is scored, domain and record id.

    Raises:
        UserError: something differs; names the record.
    """
    tokenizer = ChatTokenizer.reopen(tokens.manifest["tokenizer"])
    for start, batch in _batches(records, f"tokenize for {tokens.prefix}"):
        for index, (record, again) in enumerate(
            zip(batch, encode_or_refuse(batch, tokenizer), strict=True), start
        ):
            named = (tokens.ids(index), tokens.domain(index)) == (record.id, record.domain)
            if not named or not _same(tokens, index, again):
                raise UserError(
                    f"record {record.id!r} (index {index}) has other tokens, id or domain in "
                    f"{tokens.prefix} than its text gives: prepare it again"
                )
    masked = int(tokens.masked_records.sum())
    return f"{len(records)} records, tokenized again" + (f", {masked} masked" if masked else "")


def _same(tokens: TokenDataset, index: int, again: TokenizedRecord | str) -> bool:
    """Whether a stored record is what its text gives: tokens and marks, or a refusal."""
    if isinstance(again, str):
        return bool(tokens.masked_records[index])
    stored = tokens.record(index)
    return all(np.array_equal(a, b) for a, b in zip(_arrays(stored), _arrays(again), strict=True))


def _arrays(tokens: TokenizedRecord) -> list[np.ndarray]:
    """Return prompt ids, each response's ids, and which of them are scored."""
    marks = scored_marks(tokens.response_ids, tokens.scored)
    return [tokens.prompt_ids, *tokens.response_ids, *marks]


def check_logprobs(store: LogprobStore, tokens: TokenDataset, *, initial: bool = False) -> str:
    """Read every value: finite, at most 0, and adding up to the sums that training reads.

    Raises:
        UserError: one is not; names the record.
    """
    store.check_against(tokens, same_tokenizer=initial)
    masked = int(store.masked_records.sum())
    summary = f"{len(store)} records, {masked} of them masked"
    if not store.has_values:
        return f"{summary}; sums only"
    for index in tqdm(range(len(store)), desc=f"values of {store.prefix}", leave=False):
        if store.masked(index):
            continue
        for response, total in enumerate(store.sums(index)):
            values = store.logprobs(index, response)
            added = values.sum(dtype=np.float64)
            if (
                not np.isfinite(values).all()
                or values.max() > 0
                or not np.isclose(added, total, rtol=_ROUNDING, atol=_ROUNDING)
            ):
                raise UserError(
                    f"record {tokens.ids(index)!r}: {store.responses[response]!r} adds up to "
                    f"{added} in {store.prefix}.bin, expected {total} by {store.prefix}_sums.npy, "
                    "of finite values of at most 0: the files were changed or damaged"
                )
    return f"{summary}; all values add up"


def check_counts(store: LogprobStore, records: Sequence[PreferenceRecord]) -> str:
    """Tokenize every record for the model again, and compare the number of tokens.

    Raises:
        UserError: another number of tokens; names the record.
    """
    description = store.manifest["tokenizer"]
    if description["path"] is None:
        return "imported: its tokenizer is unknown"
    tokenizer = ChatTokenizer.reopen(description)
    known = ~noted(store.manifest["notes"], len(store), f"{store.prefix}.json")
    compared = 0
    for start, batch in _batches(records, f"tokenize for {store.prefix}"):
        whole = [(i, r) for i, r in enumerate(batch, start) if known[i]]
        encoded = encode_or_refuse([record for _, record in whole], tokenizer)
        for (index, record), again in zip(whole, encoded, strict=True):
            if isinstance(again, str):
                raise UserError(f"{store.prefix} has scored record {record.id!r}, but {again}")
            marks = scored_marks(again.response_ids, again.scored)
            expected = [int(mark.sum()) for mark in marks]
            if store.counts(index).tolist() != expected:
                raise UserError(
                    f"record {record.id!r}: {store.prefix} has log-probs of "
                    f"{store.counts(index).tolist()} tokens, but its tokenizer gives {expected}: "
                    "score it again"
                )
            compared += 1
    return f"{compared} records have the tokens of {description['path']}"


def _batches(
    records: Sequence[PreferenceRecord], title: str
) -> Iterator[tuple[int, tuple[PreferenceRecord, ...]]]:
    """Batches of records with the index of their first one, under a progress bar."""
    with tqdm(total=len(records), desc=title, leave=False) as bar:
        for number, batch in enumerate(itertools.batched(records, BATCH)):
            yield number * BATCH, batch
            bar.update(len(batch))
