"""Prompts to sample responses for, in this program's form and in those of the paper's data sets."""

import hashlib
import heapq
from collections.abc import Sequence
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
from megatron_infifpo.records.files import iter_raw, stems
from megatron_infifpo.records.form_readers import read_prompt
from megatron_infifpo.records.forms import form_of
from megatron_infifpo.records.messages import BadRecordError, Message, check_json, kind
from megatron_infifpo.records.read_report import ReadReport

# Fields that hold a prompt, in the order in which they are looked for: NuminaMath-1.5 has
# `problem`, KodCode `question` (or `conversations`), Infinity-Instruct `conversations`.
FIELDS = ("prompt", "problem", "question", "conversations", "messages", "context", "instruction")
# What a checker may need to score a response: NuminaMath-1.5's answer, KodCode's unit tests.
EXTRA = ("answer", "solution", "test", "test_info", "extra")
# Of NuminaMath's records, where they have no problem_type.
NUMINA = frozenset(
    """aops_forum amc_aime cn_contest cn_k12 gsm8k inequalities math metamath number_theory
    olympiads olympiads_ref orca_math synthetic_amc synthetic_math""".split()
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        id: unique over all files that are read together.
        domain: such as "math".
        messages: the last one is the user's or a tool's.
        extra: what the data set says beside it, for programs that score responses.
        tools: JSON schemas of the functions that the model may call.
        template_options: variables for the chat template, such as `enable_thinking`.
    """

    id: str
    domain: str
    messages: tuple[Message, ...]
    extra: dict[str, Any]
    tools: tuple[dict[str, Any], ...] = ()
    template_options: dict[str, Any] = field(default_factory=dict)


def read_prompts(
    inputs: Sequence[str],
    *,
    domain: str | None = None,
    on_bad: str = "error",
    report: ReadReport | None = None,
) -> list[Prompt]:
    """Read prompts.

    Args:
        inputs: files (`records.files.SUFFIXES`) or folders of `datasets`, each `FILE` or
            `FILE=COUNT`: so many of its prompts, chosen by their ids alone.
        domain: of records that do not say; default: by the data set's form.
        on_bad: "error" stops at the first bad record, "skip" leaves bad records out.
        report: receives what was left out, if given.

    Returns:
        The prompts in file order.

    Raises:
        UserError: names file:line, what was found and what was expected.
    """
    report = report or ReadReport()
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    files = [split_count(text) for text in inputs]
    names = stems([path for path, _ in files])
    for text, (path, count), stem in zip(inputs, files, names, strict=True):
        found: list[Prompt] = []
        for raw in iter_raw(path, stem, wanted="prompts"):
            ignored: set[str] = set()
            try:
                if raw.error is not None:
                    raise BadRecordError(raw.error)
                prompt = parse_prompt(raw.value, raw.default_id, domain, ignored)
                if prompt.id in seen:
                    raise BadRecordError(f"duplicate id {prompt.id!r}, first at {seen[prompt.id]}")
            except BadRecordError as error:
                if on_bad == "error":
                    raise UserError(f"{raw.where}: {error}") from None
                report.skipped.append(f"{raw.where}: {error}")
                continue
            seen[prompt.id] = raw.where
            report.ignored.update(ignored)
            found.append(prompt)
        prompts += found if count is None else choose(found, count, text)
    return prompts


def split_count(text: str) -> tuple[Path, int | None]:
    """Read `FILE` or `FILE=COUNT`; a file may have "=" in its name."""
    name, _, count = text.rpartition("=")
    if not name or not count.isdecimal() or Path(text).exists():
        return Path(text), None
    return Path(name), int(count)


def choose(prompts: list[Prompt], count: int, text: str) -> list[Prompt]:
    """Choose so many prompts by a hash of their ids, in their order."""
    if not 0 < count <= len(prompts):
        raise UserError(f"{text}: expected FILE=COUNT, COUNT from 1 to its {len(prompts)} prompts")

    def key(index: int) -> bytes:
        return hashlib.sha256(prompts[index].id.encode()).digest()

    return [prompts[i] for i in sorted(heapq.nsmallest(count, range(len(prompts)), key))]


def parse_prompt(
    value: Any, default_id: str, domain: str | None = None, ignored: set[str] | None = None
) -> Prompt:
    """Read one record.

    Args:
        value: as decoded.
        default_id: of a record that has none.
        domain: of a record that does not say.
        ignored: receives the names of what nothing uses, if given.

    Raises:
        BadRecordError: it has no prompt, or a malformed one.
    """
    if not isinstance(value, dict):
        raise BadRecordError(f"found {kind(value)}, expected an object")
    ignored = set() if ignored is None else ignored
    messages, inner_tools, used = _conversation(value, ignored)
    messages = (*system_messages(value, messages), *messages)
    last = messages[-1] if messages else {"role": "absent"}
    if last["role"] != "tool" and (last["role"] != "user" or not last["content"].strip()):
        raise BadRecordError(
            f"the prompt's last message is {last if messages else 'absent'}, expected a message of "
            "role user that is not empty, or of role tool"
        )
    refuse_lost(value)
    refuse_rendered(messages, "prompt")
    used |= {*COMMON, *EXTRA, "question_id"}
    ignored |= {str(n) for n in value if n not in used and value[n] is not None}
    extra = {name: value[name] for name in EXTRA if value.get(name) is not None}
    inner = extra.pop("extra", None)
    extra = {**(inner if isinstance(inner, dict) else {}), **extra}
    name = next((n for n in ("id", "question_id") if value.get(n) is not None), "id")
    return Prompt(
        label(value, name, default_id),
        label(value, "domain", domain or _domain(value)),
        messages,
        check_json(extra, "extra"),
        read_tools(value, inner_tools),
        template_options(value),
    )


def _conversation(
    value: dict[str, Any], ignored: set[str]
) -> tuple[tuple[Message, ...], Any, set[str]]:
    """Return the prompt's messages, tools that lie among them, and the fields that were read.

    A conversation that ends with an answer is there up to the user's last message: what follows is
    the data set's own reply. Of a preference record it is what its replies have in common.
    """
    found = _of_preferences(value, ignored)
    if found is None:
        name = next((name for name in FIELDS if value.get(name) is not None), None)
        if name is None:
            raise BadRecordError(f"no prompt: expected one of the fields {', '.join(FIELDS)}")
        prompt, read = read_prompt(value, name, ignored)
        found = prompt, None, set(read)
    messages, tools, used = found
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[: users[-1] + 1] if users else ()
    return messages, tools, used


def _of_preferences(
    value: dict[str, Any], ignored: set[str]
) -> tuple[tuple[Message, ...], Any, set[str]] | None:
    """Return what `_conversation` returns of a preference record; None where it is none."""
    try:
        form = form_of(value)
    except BadRecordError:
        return None
    if "responses" in form.fields and value.get("prompt") is not None:
        return None  # such as sampled ones, of which there are many: nothing to find in them
    try:
        parts = form.read(value, ignored)
    except BadRecordError:
        if "chosen" in form.fields:
            raise
        return None  # such as a tie: no pair, but a prompt all the same
    return parts.prompt, parts.tools, {*form.fields, *parts.used}


def _domain(value: dict[str, Any]) -> str:
    """Tell the domain by the data set that has such records, never by one field's name."""
    if {"problem", "solution"} <= value.keys():
        numina = {"answer", "problem_type"} & value.keys() or str(value.get("source")) in NUMINA
        return "math" if numina else "general"
    return "code" if {"question_id", "test"} <= value.keys() else "general"
