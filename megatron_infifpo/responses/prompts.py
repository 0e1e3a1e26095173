"""Prompts to sample responses for, in this program's form and in those of the paper's data sets."""

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.record_files import iter_raw
from megatron_infifpo.data.records import BadRecordError, Message, read_messages

# Field that holds the prompt -> domain of its records where they do not say: NuminaMath-1.5 has
# `problem`, KodCode `question` (or `conversations`), Infinity-Instruct `conversations`.
FIELDS = {"prompt": "general", "problem": "math", "question": "code", "conversations": "general"}
# What a checker may need to score a response: NuminaMath-1.5's answer, KodCode's unit tests.
EXTRA = ("answer", "solution", "test", "test_info", "extra")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique over all files that are read together.
        domain: such as "math".
        messages: the last one is the user's.
        extra: what the data set says beside it, for programs that score responses.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    extra: dict[str, Any]


def read_prompts(
    inputs: Sequence[str], *, domain: str | None = None, skipped: list[str] | None = None
) -> list[Prompt]:
    """Read prompts.

    Args:
        inputs: files (`.jsonl`, `.json`, each also `.gz`, `.parquet`), each `FILE` or
            `FILE=COUNT`: so many of its prompts, chosen by their ids alone.
        domain: of records that do not say; default: by the data set's form.
        skipped: receives a message for every bad record; without it the first one is an error.

    Returns:
        The prompts in file order.

    Raises:
        UserError: names file:line, what was found and what was expected.
    """
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for text in inputs:
        name, _, count = text.partition("=")
        found: list[Prompt] = []
        for raw in iter_raw(Path(name)):
            try:
                if raw.error is not None:
                    raise BadRecordError(raw.error)
                prompt = parse_prompt(raw.value, f"{raw.stem}-{raw.index}", domain)
                if prompt.id in seen:
                    raise BadRecordError(f"duplicate id {prompt.id!r}, first at {seen[prompt.id]}")
            except BadRecordError as error:
                if skipped is None:
                    raise UserError(f"{raw.where}: {error}") from None
                skipped.append(f"{raw.where}: {error}")
                continue
            seen[prompt.id] = raw.where
            found.append(prompt)
        prompts += choose(found, count, text) if count else found
    return prompts


def choose(prompts: list[Prompt], count: str, text: str) -> list[Prompt]:
    """Choose so many prompts by a hash of their ids, in their order."""
    if not count.isdecimal() or not 0 < int(count) <= len(prompts):
        raise UserError(f"{text}: expected FILE=COUNT, COUNT from 1 to its {len(prompts)} prompts")

    def key(index: int) -> bytes:
        return hashlib.sha256(prompts[index].id.encode()).digest()

    return [prompts[i] for i in sorted(heapq.nsmallest(int(count), range(len(prompts)), key))]


def parse_prompt(value: Any, default_id: str, domain: str | None = None) -> Prompt:
    """Read one record.

    Raises:
        BadRecordError: it has no prompt, or a malformed one.
    """
    if not isinstance(value, dict):
        raise BadRecordError(f"found {type(value).__name__}, expected an object")
    field = next((name for name in FIELDS if value.get(name) is not None), None)
    if field is None:
        raise BadRecordError(f"no prompt: expected one of the fields {', '.join(FIELDS)}")
    found = value[field]
    if isinstance(found, str):
        found = [{"role": "user", "content": found}]
    messages = read_messages(found, field)
    roles = [message["role"] for message in messages]
    if "assistant" in roles:  # a conversation: up to its first answer
        messages = messages[: roles.index("assistant")]
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise BadRecordError(f"field {field!r} does not end with a user's message")
    extra = {name: value[name] for name in EXTRA if value.get(name) is not None}
    inner = extra.pop("extra", None)
    by_form = "code" if "test" in extra else FIELDS[field]
    return Prompt(
        str(value.get("id") or value.get("question_id") or default_id),
        str(value.get("domain") or domain or by_form),
        messages,
        {**(inner if isinstance(inner, dict) else {}), **extra},
    )
