"""Preference records: files of many forms to one plain form.

Accepted forms: `forms.FORMS` (docs/file-formats.md has an example of each).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.fields import (
    COMMON,
    label,
    read_tools,
    refuse_lost,
    refuse_rendered,
    system_messages,
    template_options,
)
from megatron_infifpo.records.files import RawRecord, iter_files
from megatron_infifpo.records.forms import form_of
from megatron_infifpo.records.messages import (
    BadRecordError,
    Message,
    kind,
    listed,
    plain_text,
    read_messages,
    reply,
)
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.replies import add_pair_fields, check_list, check_pair

__all__ = [
    "BadRecordError",
    "Message",
    "PreferenceRecord",
    "ReadReport",
    "canonical_bytes",
    "iter_records",
    "plain_text",
    "read_messages",
    "read_records",
    "records_fingerprint",
    "reply",
]

RESPONSES = ("chosen", "rejected", "pivot_chosen")
"""The order of a pair's responses, everywhere."""

Reply = tuple[Message, ...]
"""One assistant message, or several that end with one (assistant, tool, assistant)."""

ON_BAD = ("error", "skip")
_HINT = " (--lists reads all of several rated responses, not a pair of them)"
# What a record is -> how messages call it.
_KINDS = {(True, False): "a list", (False, 2): "a pair", (False, 3): "a pair with 'pivot_chosen'"}


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt with a preferred and a rejected response, or with a list of responses.

    Attributes:
        id: unique over all files that are read together.
        domain: such as "math"; sources can be limited to some domains.
        prompt: messages; the last one is the user's or a tool's.
        responses: of a pair in `RESPONSES` order, 2 or 3 of them; of a list at least 2.
        scores: a judge's, one a response, NaN where it has none; None: there are none.
        listed: a list, whose responses have no roles; else a pair.
        cut: which responses were cut, so that their end of turn is not theirs; (): none.
        tools: JSON schemas of the functions that the conversation may call.
        template_options: variables for the chat template, such as `enable_thinking`.
    """

    id: str
    domain: str
    prompt: tuple[Message, ...]
    responses: tuple[Reply, ...]
    scores: tuple[float, ...] | None = None
    listed: bool = False
    cut: tuple[bool, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each response."""
        return response_names(len(self.responses), listed=self.listed)


def response_names(count: int, *, listed: bool) -> tuple[str, ...]:
    """Return names of so many responses: by their place in a list, by their role in a pair."""
    return tuple(f"response_{i}" for i in range(count)) if listed else RESPONSES[:count]


def read_records(
    paths: str | Path | Sequence[str | Path],
    *,
    on_bad: str = "error",
    lists: bool = False,
    report: ReadReport | None = None,
) -> list[PreferenceRecord]:
    """Read preference files and folders of `datasets` (`files.SUFFIXES`).

    Args:
        paths: the files, read in this order.
        on_bad: "error" stops at the first bad record, "skip" leaves bad records out.
        lists: of forms that rate several responses take all, instead of the best and the worst.
        report: receives what was left out, if given.

    Returns:
        The records in file order.

    Raises:
        UserError: names file:line (file:record N, from 0, in .json arrays, Parquet and folders),
            what was found and what was expected.
    """
    return list(iter_records(paths, on_bad=on_bad, lists=lists, report=report))


def iter_records(
    paths: str | Path | Sequence[str | Path],
    *,
    on_bad: str = "error",
    lists: bool = False,
    report: ReadReport | None = None,
) -> Iterator[PreferenceRecord]:
    """Yield what `read_records` returns, one record at a time."""
    found = iter_with_raw(paths, on_bad=on_bad, lists=lists, report=report)
    return (record for record, _ in found)


def iter_with_raw(
    paths: str | Path | Sequence[str | Path],
    *,
    on_bad: str = "error",
    lists: bool = False,
    report: ReadReport | None = None,
) -> Iterator[tuple[PreferenceRecord, RawRecord]]:
    """Yield the records of `read_records`, each with what the file has."""
    if on_bad not in ON_BAD:
        raise UserError(f"on_bad is {on_bad!r}, expected one of {', '.join(ON_BAD)}")
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    report = report or ReadReport()
    first_seen: dict[str, str] = {}
    known_kind = None
    for raw in iter_files(files):
        try:
            if raw.error is not None:
                raise BadRecordError(raw.error)
            record, ignored = parse_record(raw.value, default_id=raw.default_id, lists=lists)
            if record.id in first_seen:
                raise BadRecordError(
                    f"duplicate id {record.id!r}, first used at {first_seen[record.id]}; "
                    "expected every id once over all input files"
                )
            kind_now = (record.listed, not record.listed and len(record.responses))
            if known_kind not in (None, kind_now):
                raise BadRecordError(
                    f"found {_KINDS[kind_now]} although the first record is "
                    f"{_KINDS[known_kind]}; expected records of one kind{'' if lists else _HINT}"
                )
        except BadRecordError as error:
            message = f"{raw.where}: {error}"
            if on_bad == "error":
                raise UserError(message) from None
            report.skipped.append(message)
            continue
        first_seen[record.id] = raw.where
        known_kind = kind_now
        if ignored:
            report.ignored.update(ignored)
        yield record, raw
    if report.skipped and not first_seen:
        raise UserError(
            f"{', '.join(map(str, files))}: none of {len(report.skipped)} records can be used, the "
            f"first one because of this: {report.skipped[0]}"
        )


def canonical_bytes(record: PreferenceRecord) -> bytes:
    """Serialise a record for hashing; equal exactly where all that models see of it is.

    Plain replies are strings and tools are there only where a record has some, so that records of
    text alone have the bytes that they have always had. Scores are no content: other ones need no
    other log-probs.
    """
    fields: list[Any] = [record.id, record.domain, [listed(m) for m in record.prompt]]
    for messages in record.responses:
        text = plain_text(messages)
        fields.append([listed(m) for m in messages] if text is None else text)
    if record.tools or record.template_options:
        fields.append({"tools": record.tools, "options": record.template_options})
    if any(record.cut):
        fields.append({"cut": record.cut})
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def records_fingerprint(records: Iterable[PreferenceRecord]) -> str:
    """Return the sha256 (hex) of the records' content in order; no tokenizer has a part in it."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(canonical_bytes(record))
    return digest.hexdigest()


def parse_record(
    value: Any, *, default_id: str, lists: bool = False
) -> tuple[PreferenceRecord, set[str]]:
    """Turn one decoded record of any accepted form into a `PreferenceRecord`.

    Args:
        value: as decoded.
        default_id: of a record that has none.
        lists: of forms that rate several responses take all, instead of the best and the worst.

    Returns:
        The record, and the names of what it has that nothing uses.

    Raises:
        BadRecordError: something is missing, malformed, or cannot be scored as it is meant.
    """
    if not isinstance(value, dict):
        raise BadRecordError(f"found {kind(value)}, expected an object with prompt and responses")
    refuse_lost(value)
    form = form_of(value)
    ignored: set[str] = set()
    parts = form.read(value, ignored, **({"lists": True} if lists and form.rates else {}))
    prompt = (*system_messages(value, parts.prompt), *parts.prompt)
    if prompt[-1:] and prompt[-1]["role"] == "tool":
        pass  # an empty output is one
    elif not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise BadRecordError(
            f"the prompt's last message is {prompt[-1] if prompt else 'absent'}, expected a "
            "message of role user that is not empty, or of role tool"
        )
    if parts.listed:
        check_list(parts)
    else:
        add_pair_fields(value, parts, ignored)
        check_pair(parts, RESPONSES)
    refuse_rendered(prompt, "prompt")
    for number, messages in enumerate(parts.replies):
        name = f"{parts.listed}[{number}]" if parts.listed else RESPONSES[number]
        refuse_rendered(messages, name)
    unused = value.keys() - COMMON - {*form.fields, *parts.used}
    ignored |= {str(name) for name in unused if value[name] is not None}
    record = PreferenceRecord(
        id=label(value, "id", default_id),
        domain=label(value, "domain", "general"),
        prompt=prompt,
        responses=parts.replies,
        scores=parts.scores,
        listed=parts.listed is not None,
        cut=parts.cut,
        tools=read_tools(value, parts.tools),
        template_options=template_options(value),
    )
    return record, ignored
