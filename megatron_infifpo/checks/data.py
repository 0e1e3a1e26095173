"""Check everything that a training run reads, end to end, value by value.

Opening a dataset compares counts and fingerprints; this reads everything, and tokenizes again.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_infifpo.checks.logprobs import batches, check_counts, check_logprobs, check_weights
from megatron_infifpo.checks.soft_targets import check_fused_from, check_soft_targets
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_types
from megatron_infifpo.records.records import (
    PreferenceRecord,
    iter_records,
    records_fingerprint,
)
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.references.sources import (
    INITIAL,
    SourcesConfig,
    check_accuracy,
    check_domains,
    read_sources,
)
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import encode_or_refuse, scored_marks
from megatron_infifpo.tokens.lengths import domain_lengths
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord


@dataclass(frozen=True)
class DataJob:
    """Data to check; fields named as the flags of `infifpo check`.

    Attributes:
        data: prefix of the token dataset.
        sources: sources.yaml; None: no log-probs are checked.
        soft_targets: prefix of soft targets of these tokens.
        input: the records' files, if they have moved.
        weights: folders of models, by "initial" or a source's name.
        run: --save folder of a training run that must have been made of these data.
    """

    data: str
    sources: str | None = None
    soft_targets: str | None = None
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
        if tokens.listed or tokens.scores is not None:
            yield attempt(f"responses in {job.data}", lambda: check_responses(tokens, records))
    if job.soft_targets:
        targets = SoftTargetStore(job.soft_targets)
        yield attempt(job.soft_targets, lambda: check_soft_targets(targets, tokens))
        if job.sources:
            named = read_sources(job.sources)
            what = f"what {job.soft_targets} was fused from"
            yield attempt(what, lambda: check_fused_from(targets, named))
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
    records = list(iter_records(paths, on_bad="skip", lists=tokens.listed))
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
    for start, batch in batches(records, f"tokenize for {tokens.prefix}"):
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
    said = f"{len(records)} records, tokenized again" + (f", {masked} masked" if masked else "")
    lengths = (
        f"{name} {median:,}, {most:,}, {longest:,}"
        for name, _, median, most, longest in domain_lengths(tokens)
    )
    return f"{said}; median, 95 % and longest prompt with response: {'; '.join(lengths)}"


def _same(tokens: TokenDataset, index: int, again: TokenizedRecord | str) -> bool:
    """Whether a stored record is what its text gives: tokens and marks, or a refusal."""
    if isinstance(again, str):
        return bool(tokens.masked_records[index])
    here, there = _arrays(tokens.record(index)), _arrays(again)
    return len(here) == len(there) and all(map(np.array_equal, here, there))


def _arrays(tokens: TokenizedRecord) -> list[np.ndarray]:
    """Return prompt ids, each response's ids, and which of them are scored."""
    marks = scored_marks(tokens.response_ids, tokens.scored)
    return [tokens.prompt_ids, *tokens.response_ids, *marks]


def check_responses(tokens: TokenDataset, records: Sequence[PreferenceRecord]) -> str:
    """Compare every score with the records', and count responses.

    Raises:
        UserError: another score; names the record.
    """
    counts = np.array([len(record.responses) for record in records])
    scores = np.full((len(records), len(tokens.responses)), np.nan)
    for row, record in zip(scores, records, strict=True):
        if record.scores is not None:
            row[: len(record.scores)] = record.scores
    known = np.isfinite(scores)
    stored = np.full_like(scores, np.nan) if tokens.scores is None else tokens.scores
    other = ((scores != stored) & (known | np.isfinite(stored))).any(axis=1)
    if other.any():
        index = int(other.argmax())
        found, given = (table[index, : counts[index]].tolist() for table in (stored, scores))
        raise UserError(
            f"record {tokens.ids(index)!r} ({other.sum()} such records) has the scores {found} in "
            f"{tokens.prefix}, expected {given} as in the records: prepare them again (log-probs "
            "stay as they are)"
        )
    cut = sum(sum(record.cut) for record in records)
    return (
        f"{counts.min()} to {counts.max()} a record, median {np.median(counts):g}; "
        f"{known.sum() / counts.sum():.1%} of {counts.sum()} with a score, "
        f"{cut / counts.sum():.1%} cut"
    )


def _check_domains(config: SourcesConfig, tokens: TokenDataset) -> str:
    """Check the sources' domains; say what they weigh where somebody weighs them."""
    check_domains(config, tokens.domains)
    for source in config.sources:
        check_accuracy(source, source.domains or tokens.domains, config.path)
    found = f"{len(config.sources)} sources, domains {', '.join(tokens.domains)}"
    if set(config.weights) == {1.0}:
        return found
    names = (*(source.name for source in config.sources), "initial pivot")
    weights = (f"{name} {weight:g}" for name, weight in zip(names, config.weights, strict=True))
    return f"{found}, weights {', '.join(weights)}"


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
        yield attempt(f"{name}, weights", lambda: check_weights(store, model))


def _check_run(run: Path, job: DataJob) -> str:
    """Compare the data with what a run says that it is made of."""
    from megatron_infifpo.training.identity import data_identity, differences
    from megatron_infifpo.training.provenance import read_run

    found = read_run(run)
    if found is None:
        raise UserError(f"{run} has no run.json: expected the --save folder of a training run")
    used = found["identity"]["data"]
    if "initial" in used and not job.sources:
        raise UserError("the run has sources: give --sources, too")
    if "soft_targets" in used and not job.soft_targets:
        raise UserError("the run has soft targets: give --soft-targets, too")
    config = read_sources(job.sources) if job.sources and "initial" in used else None
    dataset = PreferenceDataset(job.data, config)
    dataset.targets = SoftTargetStore(job.soft_targets) if job.soft_targets else None
    changes = differences(used, data_identity(dataset, scores="scores_sha256" in used))
    if changes:
        raise UserError(f"it was made of other data: {'; '.join(changes)}")
    return f"{len(found['attempts'])} attempts on these data"
