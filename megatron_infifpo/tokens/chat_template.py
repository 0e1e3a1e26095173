"""A chat template and its habits: what it writes around a reply, learnt from probes.

Nothing is assumed of a template: every habit is what it writes for a few conversations of plain
letters, for each set of options, since options such as `enable_thinking` change the habits.
"""

import inspect
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from typing import Any

import jinja2
import jinja2.meta

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import Message
from megatron_infifpo.tokens.dates import with_one_date
from megatron_infifpo.tokens.habits import Habits, in_parts, without_opening
from megatron_infifpo.tokens.special_text import SpecialText

# Plain letters: no template trims, escapes or splits them.
_REPLY, _THOUGHT = "INFIFPOREPLY", "INFIFPOTHOUGHT"
_SYSTEM, _TOOL, _OTHER = "INFIFPOSYSTEM", "infifpo_tool", "infifpo_second"
_USER: Message = {"role": "user", "content": "INFIFPOQUESTION"}
_CALL: Message = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "id": "call00001", "function": {"name": _TOOL, "arguments": {"a": 1}}}
    ],
}
_SCHEMA = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}


@cache
def _reserved() -> set[str]:
    """What is no variable of a template: parts of messages, what apply_chat_template takes."""
    from transformers import PreTrainedTokenizerBase  # a command line is read without it

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return {"messages", "content", "reasoning_content", "tool_call", *parameters}


class RefusedRecordError(UserError):
    """A chat template cannot render a record, or not so that what is scored is known.

    Attributes:
        reason: why, in words that fit every record of the kind.
    """

    def __init__(self, record_id: str, reason: str, path: str = "") -> None:
        """Say which record, and why."""
        self.reason = reason
        of = f" of {path}" if path else ""
        super().__init__(f"the chat template{of} refuses record {record_id!r} ({reason})")


class ChatTemplate:
    """The chat template of a tokenizer."""

    def __init__(self, tokenizer: Any, path: str, options: Mapping[str, Any]) -> None:
        """Learn the habits for the options of the whole data set.

        Args:
            tokenizer: the Hugging Face tokenizer, with a template.
            path: where it came from, for errors.
            options: variables of the template, such as `enable_thinking`.

        Raises:
            UserError: the template does not render a user's message and a reply.
        """
        self._tokenizer, self.path, self.options = tokenizer, path, dict(options)
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = tokenizer.get_chat_template()
        tokenizer.chat_template = self.text = with_one_date(template)
        if "strftime_now(" in self.text:
            raise UserError(
                f"the chat template of {path} prints a date in a form that it computes, so that "
                "prompts would change by night: give a --chat-template with a date that is written"
            )
        for name in self.options:
            if not self.reads(name):
                raise UserError(
                    f"the chat template of {path} reads no variable {name!r}, expected "
                    "--chat-template-options that it reads"
                )
        self._known: dict[str, Habits] = {}
        self._able: dict[tuple[str, str], bool] = {}
        self.habits({})

    @cached_property
    def _variables(self) -> set[str]:
        """The names that the template reads and does not set itself."""
        # Tags of transformers' own, which Jinja does not know.
        plain = re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", self.text)
        parser = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        return jinja2.meta.find_undeclared_variables(parser.parse(plain))

    def reads(self, name: str) -> bool:
        """Whether the template has a variable of this name."""
        return name in self._variables and name not in _reserved()

    def render(
        self,
        messages: Iterable[Message],
        *,
        tools: Sequence[dict[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
        generate: bool = False,
    ) -> str:
        """Return what the template writes.

        Args:
            messages: as the template takes them.
            tools: JSON schemas of functions.
            options: variables of this conversation, over those of the data set.
            generate: end with the generation prompt.

        Raises:
            jinja2.TemplateError, TypeError, ValueError, LookupError: the template refuses.
        """
        return self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=generate,
            **{**self.options, **(options or {})},
        )

    def try_render(self, record_id: str, *arguments: Any, **named: Any) -> str:
        """Render, and name the record where the template refuses it."""
        try:
            return self.render(*arguments, **named)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RefusedRecordError(record_id, reason, self.path) from None

    def habits(self, options: Mapping[str, Any]) -> Habits:
        """Return the habits with a record's options over those of the data set.

        Raises:
            UserError: the template does not render a user's message and a reply.
        """
        key = json.dumps(options, sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = self._learn(options)
        return self._known[key]

    def writes(self, what: str, options: Mapping[str, Any]) -> bool:
        """Whether the template writes "tools", "tool_calls", "several calls" or role "tool"."""
        key = (what, json.dumps(options, sort_keys=True, default=str))
        if key not in self._able:
            other: dict[str, Any] = {"type": "function", "id": "call00002"}
            other |= {"function": {"name": _OTHER, "arguments": {"b": 2}}}
            result = {"role": "tool", "name": _TOOL, "tool_call_id": "call00001", "content": _REPLY}
            messages, mark = {
                "tools": ([_USER], _TOOL),
                "tool_calls": ([_USER, _CALL], _TOOL),
                "tool": ([_USER, _CALL, result], _REPLY),
                "several calls": (
                    [_USER, {**_CALL, "tool_calls": [*_CALL["tool_calls"], other]}],
                    _OTHER,
                ),
            }[what]
            tools = [_SCHEMA] if what == "tools" else []
            shown = self._probe(messages, options, tools=tools, habits=self.habits(options))
            self._able[key] = mark in shown
        return self._able[key]

    def _probe(
        self,
        messages: list[Message],
        options: Mapping[str, Any],
        *,
        tools: Sequence[dict[str, Any]] = (),
        habits: Habits | None = None,
    ) -> str:
        """Render a conversation that the template may refuse; then it is as if it wrote nothing."""
        try:
            shown = in_parts(messages) if habits and habits.as_parts else messages
            return self.render(shown, tools=tools, options=options)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return ""

    def _learn(self, options: Mapping[str, Any]) -> Habits:
        as_parts = False

        def show(*messages: Message, generate: bool = False) -> str:
            shown = in_parts(messages) if as_parts else messages
            return self.try_render("a probe", shown, options=options, generate=generate)

        plain = self._probe([_USER, _say(_REPLY)], options)
        if _REPLY not in plain:
            as_parts = _REPLY in self._probe(in_parts([_USER, _say(_REPLY)]), options)
        try:
            plain, asked, base = (
                show(_USER, _say(_REPLY)), show(_USER, generate=True), show(_USER)
            )  # fmt: skip
        except RefusedRecordError as error:
            raise UserError(
                f"the chat template of {self.path} refuses a user message and a reply "
                f"({error.reason}), expected messages that it can render"
            ) from None
        if plain.count(_REPLY) != 1 or _USER["content"] not in asked:
            raise UserError(
                f"the chat template of {self.path} does not print the assistant's reply, expected "
                "the user's message, the reply and an end of turn"
            )
        parts = in_parts if as_parts else list
        field = self._probe(parts([_USER, _say(_REPLY, _THOUGHT)]), options)
        block = self._probe(
            parts([_USER, _say(f"<think>\n{_THOUGHT}\n</think>\n\n{_REPLY}")]), options
        )
        writes = _THOUGHT in field
        header = self._header(asked, [plain, field if writes else "", block])
        lead, tail = plain[len(header) :].split(_REPLY)
        adds = ""
        if asked == base and lead.strip():
            adds = lead
            if writes:
                adds = without_opening(os.path.commonprefix([lead, field[len(header) :]]))
            lead = lead[len(adds) :]
        opens = asked[len(header) :]
        probe = (self._probe, parts, options)
        return Habits(
            opens=opens,
            adds=adds,
            header=plain.split(_REPLY)[0].split(_USER["content"])[-1].removesuffix(lead),
            gap=lead,
            lead=lead if lead.strip() else "",
            tail=tail,
            end_of_turn=self._end_of_turn(tail),
            writes_reasoning=writes,
            takes_think_text=writes and field.split(_THOUGHT)[0] == block.split(_THOUGHT)[0],
            opens_reasoning=writes or without_opening(asked) != asked,
            thinks=field.split(_THOUGHT)[0][len(header) + len(adds) :] if writes else "",
            closes=field.split(_THOUGHT)[-1].split(_REPLY)[0] if writes else "",
            folds_system=not _writes_role(*probe, "system"),
            knows_developer=_writes_role(*probe, "developer"),
            as_parts=as_parts,
        )

    def _header(self, asked: str, replied: Sequence[str]) -> str:
        """What a prompt and all conversations that have a reply begin with."""
        header = os.path.commonprefix([asked, *filter(None, replied)])
        if header == asked:
            return header
        header = without_opening(header)
        if _USER["content"] not in header:
            raise UserError(
                f"the chat template of {self.path} writes a conversation that has a reply "
                "otherwise than its prompt from the start: what is scored cannot be known"
            )
        return header

    def _end_of_turn(self, tail: str) -> str:
        """Cut what follows a reply where a model stops.

        That is after the first special token, and those that adjoin it if the last of them is the
        end of text; without special tokens it is all but the white space at the end.
        """
        names = SpecialText(self._tokenizer).names
        found = [(tail.index(s), -len(s), s) for s in names if s in tail]
        if not found:
            return tail.rstrip()
        position, _, special = min(found)
        end = position + len(special)
        run, eos = end, self._tokenizer.eos_token
        while following := max((s for s in names if tail.startswith(s, run)), key=len, default=""):
            run += len(following)
            if following == eos:
                return tail[:run]
        return tail[:end]


def _say(text: str, thought: str | None = None) -> Message:
    said: Message = {"role": "assistant", "content": text}
    return said if thought is None else said | {"reasoning_content": thought}


def _writes_role(probe: Any, parts: Any, options: Mapping[str, Any], role: str) -> bool:
    """Whether a template prints a message of a role (Gemma 2's raises, others drop it)."""
    return _SYSTEM in probe(parts([{"role": role, "content": _SYSTEM}, _USER]), options)
