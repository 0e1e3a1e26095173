"""Check one model's log-probs, value by value: what they are of, and whether they add up."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from megatron_infifpo.checks.top_k import check_top_k
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.storage.notes import noted
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import encode_or_refuse, scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer

BATCH = 256
_ROUNDING = 1e-6  # of a float64 sum of float32 values, relative


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
                or (values > 0).any()
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

    With `--top-k` also what is stored of each token, see `check_top_k`.

    Raises:
        UserError: another number of tokens, or a value that cannot be; names the record.
    """
    description = store.manifest["tokenizer"]
    if description["path"] is None:
        return "imported: its tokenizer is unknown"
    tokenizer = ChatTokenizer.reopen(description)
    known = ~noted(store.manifest["notes"], len(store), f"{store.prefix}.json")
    compared = 0
    for start, batch in batches(records, f"tokenize for {store.prefix}"):
        whole = [(i, r) for i, r in enumerate(batch, start) if known[i]]
        encoded = encode_or_refuse([record for _, record in whole], tokenizer)
        for (index, record), again in zip(whole, encoded, strict=True):
            if isinstance(again, str):
                raise UserError(f"{store.prefix} has scored record {record.id!r}, but {again}")
            marks = scored_marks(again.response_ids, again.scored)
            expected = [int(mark.sum()) for mark in marks]
            counts = store.counts(index)
            if (found := counts[counts > 0].tolist()) != expected:
                raise UserError(
                    f"record {record.id!r}: {store.prefix} has log-probs of {found} tokens, "
                    f"but its tokenizer gives {expected}: score it again"
                )
            if store.top_k is not None:
                check_top_k(store, tokenizer, index, record, again)
            compared += 1
    more = "" if store.top_k is None else f", their {store.top_k} most probable ones as expected"
    return f"{compared} records have the tokens of {description['path']}{more}"


def check_weights(store: LogprobStore, model: str) -> str:
    """Compare the fingerprint of a model's weights."""
    from megatron_infifpo.convert.fingerprint import weights_fingerprint

    expected = store.manifest["weights_sha256"]
    if expected is None:
        return "imported: its weights are unknown"
    found = weights_fingerprint(model)
    if found != expected:
        raise UserError(
            f"{model} has weights of fingerprint {found[:12]}, but {store.prefix} was scored with "
            f"{expected[:12]}: score it again"
        )
    return f"{model}, fingerprint {found[:12]}"


def batches(
    records: Sequence[PreferenceRecord], title: str
) -> Iterator[tuple[int, tuple[PreferenceRecord, ...]]]:
    """Batches of records with the index of their first one, under a progress bar."""
    with tqdm(total=len(records), desc=title, leave=False) as bar:
        for number, batch in enumerate(itertools.batched(records, BATCH)):
            yield number * BATCH, batch
            bar.update(len(batch))
