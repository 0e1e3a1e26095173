"""One record as training sees it: tokens, every model's log-probs, the fused reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_infifpo.checks.step_zero import reference_table
from megatron_infifpo.checks.token_table import token_table
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_types
from megatron_infifpo.methods import METHODS, Method, resolve
from megatron_infifpo.records.records import PreferenceRecord, iter_records
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import SourcesConfig, read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset, PreferencePair
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.rendering import Reply
from megatron_infifpo.tokens.tokenization import ChatTokenizer

EDGE = 6  # tokens shown on each side of a border


@dataclass(frozen=True)
class InspectionJob:
    """A record to look at; fields named as the flags of `infifpo inspect`.

    Attributes:
        data: prefix of the token dataset.
        id: of the record.
        sources: sources.yaml; None: no log-probs are shown.
        soft_targets: prefix of soft targets of these tokens; what they say of each is shown, and no
            reference.
        tokenizer: folder, if it is no longer where the dataset was made with it.
        tokens: show what every model's template renders, and its tokens of each response with
            their log-probs; without sources those of the pivot.
        trust_remote_code: run code that comes with the tokenizers.
        method: how the record is used; None: "infifpo" for pairs, and of lists, where no method is
            the usual one, only what does not depend on it is shown.
    """

    data: str
    id: str
    sources: str | None = None
    soft_targets: str | None = None
    tokenizer: str | None = None
    tokens: bool = False
    trust_remote_code: bool = False
    method: Method | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading a file.

        Raises:
            UserError: a field of another type, or an option without effect.
        """
        check_types(self)
        # A preset says which responses are used, too.
        changed = self.method not in (None, *map(resolve, METHODS))
        if changed and self.soft_targets is not None:
            raise UserError("an option of the method has no effect with --soft-targets")
        if self.sources is None and changed:
            raise UserError("an option of the method has no effect without --sources")


def inspect_record(job: InspectionJob) -> Iterator[str]:
    """Show a record as training sees it, at step 0, when the policy is the initial pivot.

    Yields:
        Text, to be printed line by line.

    Raises:
        UserError: data that cannot be read, or no such record.
    """
    config = read_sources(job.sources) if job.sources else None
    method, dataset = _open(job, config)
    index = dataset.tokens.find(job.id)
    if index is None:
        raise UserError(
            f"{job.data} has no record {job.id!r}, expected an id such as {dataset.tokens.ids(0)!r}"
        )
    tokenizer = ChatTokenizer.reopen(
        dataset.tokens.manifest["tokenizer"],
        job.tokenizer,
        trust_remote_code=job.trust_remote_code,
    )
    pair = dataset[index]
    yield f"record {job.id!r}, index {index}, domain {dataset.tokens.domain(index)}"
    if dataset.tokens.masked_records[index]:
        yield f"masked: {dataset.tokens.note(index)}; training leaves this record out"
        return
    for remark in dataset.tokens.remarks(index):
        yield f"remark: {remark}"
    missing = next((why for why, holds in dataset.lacking.items() if holds[index]), None)
    unused = set(range(len(dataset.tokens.responses))) - set(dataset.columns[index].tolist())
    yield from _tokens(dataset, index, tokenizer, unused if missing is None else set())
    if missing is not None:
        yield f"\nno response is used: {missing}; training leaves this record out"
    elif method is None and dataset.tokens.listed:
        yield "\nhow a list is used is up to the method, and no --method was given"
    elif dataset.tokens.listed:
        yield f"\nused, in this order: {', '.join(dataset.names(index))}"
    if dataset.initial is not None:
        yield from _models_table(dataset, pair)
    if job.tokens:
        yield from _renderings(dataset, index, tokenizer, job.trust_remote_code)
    if dataset.initial is not None:
        if missing is None and method is not None:
            yield from reference_table(dataset, pair, method)
    if job.soft_targets is not None:
        yield from token_table(dataset, index, tokenizer, job.soft_targets)


def _open(
    job: InspectionJob, config: SourcesConfig | None
) -> tuple[Method | None, PreferenceDataset]:
    """Return how the record is used, and the data set as that sees it; None: all responses."""
    method = job.method
    if job.soft_targets or (method is None and TokenDataset(job.data).listed):
        return None, PreferenceDataset(job.data, config)
    method = method or resolve("infifpo")
    return method, PreferenceDataset.for_method(method, job.data, config)


def _tokens(
    dataset: PreferenceDataset, index: int, tokenizer: ChatTokenizer, unused: set[int]
) -> Iterator[str]:
    """Prompt and responses decoded, what is known of each, and the ids around each border."""
    hf, record = tokenizer.tokenizer, dataset.tokens.record(index)

    def ids(part: np.ndarray) -> str:
        return " ".join(f"{i}:{hf.decode([i])!r}" for i in part.tolist())

    yield f"\nprompt, {len(record.prompt_ids)} tokens, not scored:"
    yield hf.decode(record.prompt_ids.tolist())
    marks = scored_marks(record.response_ids, record.scored)
    for r, (response, mark) in enumerate(zip(record.response_ids, marks, strict=True)):
        known = [f"{len(response)} tokens", f"{int(mark.sum())} of them scored"]
        if dataset.tokens.scores is not None:
            score = dataset.tokens.scores[index, r]
            known.append("no score" if np.isnan(score) else f"score {score:g}")
        if not mark[-1]:
            known.append("cut, without its end of turn")
        if r in unused:
            known.append("not used")
        yield f"\n{dataset.tokens.responses[r]}, {', '.join(known)}:"
        yield hf.decode(response.tolist())
        for number, part in enumerate(_unscored_parts(response, mark), 1):
            yield f"  not scored, {number}: {hf.decode(part.tolist())!r}"
        yield f"  border: ... {ids(record.prompt_ids[-EDGE:])}  |  {ids(response[:EDGE])} ..."
        yield f"  end:    ... {ids(response[-EDGE:])}"


def _unscored_parts(ids: np.ndarray, mark: np.ndarray) -> list[np.ndarray]:
    """Return the runs of tokens that are not scored."""
    borders = np.flatnonzero(np.diff(mark)) + 1
    parts = zip(np.split(ids, borders), np.split(mark, borders), strict=True)
    return [part for part, scored in parts if not scored.all()]


def _models(dataset: PreferenceDataset) -> list[tuple[str, LogprobStore]]:
    """Name and log-probs of the initial pivot and of every source."""
    references = dataset.references
    assert references is not None
    sources = [(source.name, source.store) for source in references.sources]
    return [("initial pivot", references.initial.store), *sources]


def _models_table(dataset: PreferenceDataset, pair: PreferencePair) -> Iterator[str]:
    """How each model was scored, then its sum, tokens and mean for each response."""
    yield "\nhow they were scored"
    for name, store in _models(dataset):
        yield f"{name:<24}{_origin(store.manifest)}"
    yield "\nlog-probs"
    yield f"{'model':<24}{'response':<14}{'sum':>12}{'tokens':>8}{'mean':>10}"
    for column, (name, store) in enumerate(_models(dataset), start=-1):
        note = store.note(pair.index)
        if store.masked(pair.index):
            yield f"{name:<24}masked: {note}"
            continue
        assert pair.values is not None
        if column >= 0 and not pair.values.source_mask[column]:
            note = "masked: its domains do not include this record's"
        sums, counts = store.sums(pair.index), store.counts(pair.index)
        for response, total, count in zip(store.responses, sums, counts, strict=True):
            if not count:
                continue  # the list is shorter
            line = f"{name:<24}{response:<14}{total:>12.4f}{count:>8}{total / count:>10.4f}"
            yield f"{line}  {note}" if note else line


def _origin(manifest: dict[str, Any]) -> str:
    """Say in a line where log-probs come from and what its model was shown."""
    chat = manifest["tokenizer"]
    made = f"{manifest['model']}, {manifest['backend']}, {manifest['dtype']}"
    if chat["path"] is None:
        return f"{made}; tokenizer and chat template unknown"
    template = "chat template given by hand; " if chat["chat_template"] else ""
    return (
        f"{made}; tokenizer {chat['path']}; {template}system message {chat['system_message']}; "
        f"a turn ends with {chat['end_of_turn']!r}"
    )


def _renderings(
    dataset: PreferenceDataset, index: int, tokenizer: ChatTokenizer, trust_remote_code: bool
) -> Iterator[str]:
    """What each model is shown of a record, or the pivot alone where there are no log-probs."""
    files, record_id = dataset.tokens.manifest["source_files"], dataset.tokens.ids(index)
    records = iter_records(files, on_bad="skip", lists=dataset.tokens.listed)
    record = next((r for r in records if r.id == record_id), None)
    if record is None:
        raise UserError(f"--tokens needs the record's text, but {record_id!r} is not in {files}")
    if dataset.initial is None:
        yield "\npivot: what it is shown"
        yield from _rendering(record, tokenizer, None)
        return
    for name, store in _models(dataset):
        yield f"\n{name}: what it was shown, and the log-probs of its tokens"
        known = store.has_values and store.manifest["tokenizer"]["path"] is not None
        if store.masked(index) or not known:
            yield f"  none: {store.note(index) or 'imported without tokens or without values'}"
            continue
        try:
            chat = ChatTokenizer.reopen(
                store.manifest["tokenizer"], trust_remote_code=trust_remote_code
            )
        except UserError as error:
            yield f"  not shown: {error}"
            continue
        responses = range(len(record.responses))
        values = [store.logprobs(index, r).tolist() for r in responses]
        yield from _rendering(record, chat, values)


def _rendering(
    record: PreferenceRecord, chat: ChatTokenizer, logprobs: Sequence[Sequence[float]] | None
) -> Iterator[str]:
    """What a template renders, and its tokens: `[not scored]`, or with the log-prob if known."""
    rendered, tokens, decode = chat.render(record), chat.encode(record), chat.tokenizer.decode
    yield f"the template renders: {rendered.prompt}"
    if (shown := decode(tokens.prompt_ids.tolist())) != rendered.prompt:
        yield f"its tokens read: {shown}"
    marks = scored_marks(tokens.response_ids, tokens.scored)
    for r, (response, mark) in enumerate(zip(record.names, marks, strict=True)):
        values = None if logprobs is None else iter(logprobs[r])
        words = []
        for token, scored in zip(tokens.response_ids[r].tolist(), mark.tolist(), strict=True):
            value = next(values, None) if scored and values is not None else None
            if scored and values is not None and value is None:
                break  # it was cut
            word = repr(decode([token])) if scored else f"[{decode([token])!r}]"
            words.append(word if value is None else f"{word} {value:.3f}")
        yield f"{response}, rendered, what is scored in « »: {_marked(rendered.replies[r])}"
        yield f"{response}, tokens: " + " ".join(words)


def _marked(reply: Reply) -> str:
    """Return a reply's text with marks around what is scored."""
    text, end = "", 0
    for start, stop in reply.scored:
        text += f"{reply.text[end:start]}«{reply.text[start:stop]}»"
        end = stop
    return text + reply.text[end:]
