"""Preference records: JSONL, JSON and Parquet files to one plain form.

Accepted forms (docs/file-formats.md has an example of each): explicit prompt, TRL's implicit prompt
(`chosen` and `rejected` are whole conversations) and ShareGPT (`conversations`).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.record_files import iter_raw

RESPONSES = ("chosen", "rejected", "pivot_chosen")
"""The order of a record's responses, everywhere."""

ON_BAD = ("error", "skip")
ROLES = {r: r for r in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}

Message = dict[str, Any]
"""`{"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}`, and where it
has them `reasoning_content`, `tool_calls`, `name`, `tool_call_id`."""


@dataclass(frozen=True, slots=True)
class PreferenceRecord:
    """One prompt with a preferred and a rejected response.

    A reply is one assistant message, or several that end with one (assistant, tool, assistant).

    Attributes:
        id: unique over all files that are read together.
        domain: such as "math"; sources can be limited to some domains.
        prompt: messages; the last one is the user's or a tool's.
        chosen: messages of the preferred response.
        rejected: messages of the other response.
        pivot_chosen: messages of the pivot's own best response (WRPO), if there is one.
        tools: JSON schemas of the functions that the conversation may call.
        template_options: variables for the chat template, such as `enable_thinking`.
    """

    id: str
    domain: str
    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    pivot_chosen: tuple[Message, ...] | None = None
    tools: tuple[dict[str, Any], ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)

    @property
    def responses(self) -> tuple[tuple[Message, ...], ...]:
        """The responses in `RESPONSES` order, 2 or 3 of them."""
        pair = (self.chosen, self.rejected)
        return pair if self.pivot_chosen is None else (*pair, self.pivot_chosen)


def reply(text: str) -> tuple[Message, ...]:
    """Return the reply that is just this text."""
    return ({"role": "assistant", "content": text},)


def plain_text(messages: tuple[Message, ...]) -> str | None:
    """Return the text of a reply that is just text; None if it is more than that."""
    if len(messages) == 1 and len(messages[0]) == 2 and messages[0]["role"] == "assistant":
        return messages[0]["content"]
    return None


class BadRecordError(Exception):
    """What is wrong with one record; whoever reads the file adds where."""


def read_records(
    paths: str | Path | Sequence[str | Path],
    *,
    on_bad: str = "error",
    skipped: list[str] | None = None,
) -> list[PreferenceRecord]:
    """Read preference files: `.jsonl`, `.json` (each also `.gz`) and `.parquet`.

    Args:
        paths: the files, read in this order.
        on_bad: "error" stops at the first bad record, "skip" leaves bad records out.
        skipped: receives one message a skipped record, if given.

    Returns:
        The records in file order.

    Raises:
        UserError: names file:line (file:record N, from 0, in .json arrays and Parquet), what was
            found and what was expected.
    """
    return list(iter_records(paths, on_bad=on_bad, skipped=skipped))


def iter_records(
    paths: str | Path | Sequence[str | Path],
    *,
    on_bad: str = "error",
    skipped: list[str] | None = None,
) -> Iterator[PreferenceRecord]:
    """Yield what `read_records` returns, one record at a time."""
    if on_bad not in ON_BAD:
        raise UserError(f"on_bad is {on_bad!r}, expected one of {', '.join(ON_BAD)}")
    files = [Path(p) for p in ([paths] if isinstance(paths, str | Path) else paths)]
    first_seen: dict[str, str] = {}
    with_pivot = None
    for path in files:
        for raw in iter_raw(path):
            try:
                if raw.error is not None:
                    raise BadRecordError(raw.error)
                record = _parse(raw.value, default_id=f"{raw.stem}-{raw.index}")
                if record.id in first_seen:
                    raise BadRecordError(
                        f"duplicate id {record.id!r}, first used at {first_seen[record.id]}; "
                        "expected every id once over all input files"
                    )
                if with_pivot is not None and with_pivot != (record.pivot_chosen is not None):
                    found, before = ("no ", "has one") if with_pivot else ("", "has none")
                    raise BadRecordError(
                        f"found {found}'pivot_chosen' although the first record {before}; expected "
                        "it in every record or in none"
                    )
            except BadRecordError as error:
                message = f"{raw.where}: {error}"
                if on_bad == "error":
                    raise UserError(message) from None
                if skipped is not None:
                    skipped.append(message)
                continue
            first_seen[record.id] = raw.where
            with_pivot = record.pivot_chosen is not None
            yield record


def canonical_bytes(record: PreferenceRecord) -> bytes:
    """Serialise a record for hashing; equal exactly where all its content is.

    Plain replies are strings and tools are there only where a record has some, so that records of
    text alone have the bytes that they have always had.
    """
    fields: list[Any] = [record.id, record.domain, [listed(m) for m in record.prompt]]
    for messages in record.responses:
        text = plain_text(messages)
        fields.append([listed(m) for m in messages] if text is None else text)
    if record.tools or record.template_options:
        fields.append({"tools": record.tools, "options": record.template_options})
    return json.dumps(fields, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def listed(message: Message) -> list[Any]:
    """Return [role, content] and, of a message that has more, the rest: one form for hashes."""
    rest = {name: message[name] for name in sorted(message) if name not in ("role", "content")}
    return [message["role"], message["content"], *([rest] if rest else [])]


def records_fingerprint(records: Iterable[PreferenceRecord]) -> str:
    """Return the sha256 (hex) of the records' content in order; no tokenizer has a part in it."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(canonical_bytes(record))
    return digest.hexdigest()


def _parse(value: Any, *, default_id: str) -> PreferenceRecord:
    """Turn one decoded record of any accepted form into a `PreferenceRecord`."""
    if not isinstance(value, dict):
        raise BadRecordError(f"found {_kind(value)}, expected an object with prompt and responses")
    for name in ("chosen", "rejected"):
        if value.get(name) is None:
            raise BadRecordError(
                f"field {name!r} is missing, found {sorted(value)}; expected a string or a list of "
                "messages"
            )
    prompt_field = next((n for n in ("prompt", "conversations") if value.get(n) is not None), None)
    if prompt_field is not None:
        prompt = _prompt(value[prompt_field], prompt_field)
        chosen, rejected = (_response(value[n], n) for n in ("chosen", "rejected"))
    else:
        prompt, chosen, rejected = _split_conversations(value["chosen"], value["rejected"])
    if not prompt or prompt[-1]["role"] != "user" or not prompt[-1]["content"].strip():
        raise BadRecordError(
            f"the prompt's last message is {prompt[-1] if prompt else 'absent'}, expected a "
            "message of role user that is not empty"
        )
    pivot_value = value.get("pivot_chosen")
    pivot_chosen = None if pivot_value is None else _response(pivot_value, "pivot_chosen")
    for name, text in (("chosen", chosen), ("pivot_chosen", pivot_chosen)):
        if text is not None and text.strip() == rejected.strip():
            raise BadRecordError(
                f"{name!r} equals 'rejected' ({_short(text)}), expected two different responses"
            )
    return PreferenceRecord(
        id=_label(value, "id", default_id),
        domain=_label(value, "domain", "general"),
        prompt=prompt,
        chosen=reply(chosen),
        rejected=reply(rejected),
        pivot_chosen=None if pivot_chosen is None else reply(pivot_chosen),
    )


def _label(value: dict[str, Any], name: str, default: str) -> str:
    """Return a short text field that may be absent; whole numbers are taken as text."""
    found = value.get(name)
    if found is None:
        return default
    if isinstance(found, int) and not isinstance(found, bool):
        return str(found)
    text = _text(found, name).strip()
    if not text:
        raise BadRecordError(
            f"field {name!r} is empty, expected a name; leave it out for {default!r}"
        )
    return text


def _prompt(value: Any, name: str) -> tuple[Message, ...]:
    """Return the prompt's messages; a string is one user message."""
    if isinstance(value, str):
        return ({"role": "user", "content": _text(value, name)},)
    return read_messages(value, name)


def _response(value: Any, name: str) -> str:
    """Return a response's text: a string, one assistant message, or a list of just that."""
    if isinstance(value, str):
        text = _text(value, name)
    else:
        messages = read_messages([value] if isinstance(value, dict) else value, name)
        if len(messages) != 1 or messages[0]["role"] != "assistant":
            roles = [m["role"] for m in messages]
            raise BadRecordError(
                f"field {name!r} holds messages of roles {roles}, expected exactly one message of "
                "role assistant after the prompt"
            )
        text = messages[0]["content"]
    if not text.strip():
        raise BadRecordError(f"field {name!r} is empty ({text!r}), expected a response with text")
    return text


def _split_conversations(chosen: Any, rejected: Any) -> tuple[tuple[Message, ...], str, str]:
    """Split TRL's implicit-prompt form: two conversations that differ in their last message."""
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise BadRecordError(
            "field 'prompt' is missing; expected it as a string or a list of messages (only "
            "conversations in 'chosen' and 'rejected' may carry the prompt themselves)"
        )
    whole = [read_messages(chosen, "chosen"), read_messages(rejected, "rejected")]
    if whole[0][:-1] != whole[1][:-1]:
        raise BadRecordError(
            f"'chosen' ({len(whole[0])} messages) and 'rejected' ({len(whole[1])}) differ before "
            "their last message, expected one common prompt and one response each"
        )
    texts = [_response([m[-1]], name) for m, name in zip(whole, RESPONSES, strict=False) if m]
    if len(texts) != 2:
        raise BadRecordError("'chosen' and 'rejected' are empty lists, expected conversations")
    return whole[0][:-1], texts[0], texts[1]


def read_messages(value: Any, name: str) -> tuple[Message, ...]:
    """Return messages of `role`/`content` or ShareGPT's `from`/`value` as `Message`s."""
    if not isinstance(value, list):
        raise BadRecordError(
            f"field {name!r} is {_kind(value)}, expected a string or a list of messages"
        )
    messages = []
    for number, item in enumerate(value):
        where = f"{name}[{number}]"
        keys = (
            ("from", "value") if isinstance(item, dict) and "from" in item else ("role", "content")
        )
        if not isinstance(item, dict) or any(item.get(k) is None for k in keys):
            found = sorted(item) if isinstance(item, dict) else _kind(item)
            raise BadRecordError(
                f"message {where!r} is {found}, expected an object with role and content (or from "
                "and value)"
            )
        role = item[keys[0]]
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecordError(
                f"message {where!r} has the role {role!r}, expected one of {', '.join(ROLES)}"
            )
        if item.get("tool_calls"):
            raise BadRecordError(
                f"message {where!r} has tool_calls, expected plain text; render them into the "
                "content or leave the record out"
            )
        messages.append({"role": ROLES[role], "content": _text(item[keys[1]], where)})
    return tuple(messages)


def _text(value: Any, name: str) -> str:
    """Return a string that UTF-8 can encode."""
    if not isinstance(value, str):
        raise BadRecordError(f"{name!r} is {_kind(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(
            f"{name!r} holds half a surrogate pair ({value[error.start]!a}) at character "
            f"{error.start}, expected valid Unicode text"
        ) from None
    return value


def _kind(value: Any) -> str:
    """Describe a JSON value in an error: its type and its start."""
    names = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        type(None): "null",
        str: "a string",
    }
    return f"{names.get(type(value), 'a number')} ({_short(value)})"


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
