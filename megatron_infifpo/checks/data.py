"""Check everything that a training run reads, end to end, value by value.

Opening a dataset compares counts and fingerprints; this reads everything, and tokenizes again.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_types
from megatron_infifpo.records.records import (
    PreferenceRecord,
    iter_records,
    records_fingerprint,
)
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import SourcesConfig, check_domains, read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.storage.notes import noted
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import encode_or_refuse, scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

BATCH = 256
_ROUNDING = 1e-6  # of a float64 sum of float32 values, relative
INITIAL = "initial"


@dataclass(frozen=True)
class DataJob:
    """Data to check; fields named as the flags of `infifpo check`.

    Attributes:
        data: prefix of the token dataset.
        sources: sources.yaml; None: only the tokens are checked.
        input: the records' files, if they have moved.
        weights: folders of models, by "initial" or a source's name.
        run: --save folder of a training run that must have been made of these data.
    """

    data: str
    sources: str | None = None
    input: Sequence[str] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    run: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: a field of another type, or an option without effect.
        """
        check_types(self)
        if self.weights and self.sources is None:
            raise UserError("--weights has no effect without --sources")


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


def check_data(job: DataJob) -> Iterator[Check]:
    """Check data, from records over tokens and log-probs to weights and a run, one by one.

    Records must have the fingerprint that the manifests name; their texts are tokenized again, for
    the pivot and for every source; every stored log-prob is read; fingerprints of weights are
    computed where their folders are given.

    Yields:
        One thing after the other, good or not, as soon as it has been looked at.

    Raises:
        UserError: a file that cannot be read at all, or weights of an unknown model.
    """
    tokens = TokenDataset(job.data)
    records: list[PreferenceRecord] = []

    def read() -> str:
        records.extend(read_source_records(tokens, job.input))
        return f"{len(records)}, fingerprint {tokens.records_sha256[:12]}"

    yield attempt("records", read)
    if records:
        yield attempt(f"tokens in {job.data}", lambda: check_tokens(tokens, records))
    if job.sources:
        config = read_sources(job.sources)
        yield attempt(job.sources, lambda: _check_domains(config, tokens))
        prefixes = {INITIAL: config.initial} | {s.name: s.logprobs for s in config.sources}
        if unknown := job.weights.keys() - prefixes.keys():
            names = ", ".join(prefixes)
            raise UserError(f"--weights {sorted(unknown)[0]}=: expected one of {names}")
        for name, prefix in prefixes.items():
            yield from _check_model(name, prefix, tokens, records, job.weights.get(name))
    if job.run:
        run = Path(job.run)
        yield attempt(f"{run}/run.json", lambda: _check_run(run, job))


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


def _check_domains(config: SourcesConfig, tokens: TokenDataset) -> str:
    """Check the sources' domains."""
    check_domains(config, tokens.domains)
    return f"{len(config.sources)} sources, domains {', '.join(tokens.domains)}"


def _check_model(
    name: str, prefix: str, tokens: TokenDataset, records: list[PreferenceRecord], model: str | None
) -> Iterator[Check]:
    """Check one model's log-probs; its weights, too, where its folder is given."""
    try:
        store = LogprobStore(prefix)
    except UserError as error:
        yield Check(name, str(error))
        return
    initial = name == INITIAL
    yield attempt(f"{name}, log-probs", lambda: check_logprobs(store, tokens, initial=initial))
    if records:
        yield attempt(f"{name}, tokens", lambda: check_counts(store, records))
    if model is not None:
        yield attempt(f"{name}, weights", lambda: _check_weights(store, model))


def _check_weights(store: LogprobStore, model: str) -> str:
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


def _check_run(run: Path, job: DataJob) -> str:
    """Compare the data with what a run says that it is made of."""
    from megatron_infifpo.training.provenance import data_identity, differences, read_run

    found = read_run(run)
    if found is None:
        raise UserError(f"{run} has no run.json: expected the --save folder of a training run")
    used = found["identity"]["data"]
    if "initial" in used and not job.sources:
        raise UserError("the run has sources: give --sources, too")
    config = read_sources(job.sources) if job.sources and "initial" in used else None
    changes = differences(used, data_identity(PreferenceDataset(job.data, config)))
    if changes:
        raise UserError(f"it was made of other data: {'; '.join(changes)}")
    return f"{len(found['attempts'])} attempts on these data"


def _batches(
    records: Sequence[PreferenceRecord], title: str
) -> Iterator[tuple[int, tuple[PreferenceRecord, ...]]]:
    """Batches of records with the index of their first one, under a progress bar."""
    with tqdm(total=len(records), desc=title, leave=False) as bar:
        for number, batch in enumerate(itertools.batched(records, BATCH)):
            yield number * BATCH, batch
            bar.update(len(batch))
