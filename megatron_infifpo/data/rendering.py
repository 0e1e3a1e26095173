"""A record as its template renders it: the prompt, the replies, and which of their text is scored.

The rule: prompt and reply are a prefix of what the template renders for that very conversation. Of
a record the prompt is rendered once with the generation prompt, and each conversation once.

- The prompt ends with the generation prompt, and with what the template then writes before the
  text of every reply of the record (an empty think block).
- Where the generation prompt opens a block that a finished reply does not have, the prompt ends
  before that block.
- The reply ends with the end of turn that the template writes; it may write none.
- What cannot be placed in the rendered text is refused, never guessed.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_infifpo.data.chat_template import (
    THOUGHTS,
    ChatTemplate,
    Habits,
    RefusedRecordError,
    fold_system,
    in_parts,
    only_opens,
    without_opening,
)
from megatron_infifpo.data.records import Message, PreferenceRecord
from megatron_infifpo.data.special_text import SpecialText

SCORE = ("last", "all")
REASONING = ("auto", "yes", "no")


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply as text.

    Attributes:
        text: what follows the record's prompt, up to and including the end of turn.
        scored: ranges `(start, end)` of characters, ascending.
    """

    text: str
    scored: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A record as text.

    Attributes:
        prompt: the text before all replies.
        replies: one for each response.
        notes: what is not as one would think, in words that fit every record of the kind.
    """

    prompt: str
    replies: tuple[Reply, ...]
    notes: tuple[str, ...] = ()


@dataclass
class _Whole:
    """A rendered conversation with one reply."""

    text: str
    starts: list[int]  # where a prompt may end, longest first
    scored: list[tuple[int, int]]
    end: int


class Renderer:
    """Renders records by one template.

    Attributes:
        score: "last": the assistant's messages after the user's last one; "all": every one of the
            conversation.
        reasoning: whether reasoning is scored; "auto": by models whose template writes it.
    """

    def __init__(
        self, template: ChatTemplate, special: SpecialText, score: str, reasoning: str
    ) -> None:
        """Keep the choices."""
        self.template, self.score, self.reasoning = template, score, reasoning
        self._special = special

    def prompt(
        self,
        messages: Iterable[Message],
        record_id: str,
        *,
        tools: Sequence[dict[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return what a model is shown when it is to write the next reply.

        Raises:
            RefusedRecordError: the template cannot render it.
        """
        options = options or {}
        habits = self.template.habits(options)
        shown = self._as_taken(messages, habits)
        text = self.template.try_render(
            record_id, shown, tools=tools, options=options, generate=True
        )
        self._check_written(record_id, messages, text, tools, options)
        return text + habits.adds

    def split(self, record: PreferenceRecord) -> Rendering:
        """Render a record and find what of it is scored.

        Raises:
            RefusedRecordError: the template cannot render it, or rewrites it.
        """
        notes: dict[str, None] = {}
        record = self._with_known_options(record, notes)
        prompt, replies = record.prompt, record.responses
        if self.score == "all":
            turn = next((i for i, m in enumerate(prompt) if m["role"] == "assistant"), len(prompt))
            prompt, replies = prompt[:turn], tuple((*prompt[turn:], *r) for r in replies)
        asked = self.prompt(prompt, record.id, tools=record.tools, options=record.template_options)
        wholes = [self._whole(record, prompt, reply, asked, notes) for reply in replies]
        start = _common_start(wholes)
        if start < len(asked):
            opens = asked[start:]
            notes[f"the prompt ends before {opens!r}, which the template opens for new replies"] = (
                None
            )
        return Rendering(
            wholes[0].text[:start],
            tuple(
                Reply(w.text[start : w.end], tuple((a - start, b - start) for a, b in w.scored))
                for w in wholes
            ),
            tuple(notes),
        )

    def _with_known_options(
        self, record: PreferenceRecord, notes: dict[str, None]
    ) -> PreferenceRecord:
        """Leave out options that this template does not read: they are for other models."""
        unknown = [name for name in record.template_options if not self.template.reads(name)]
        for name in unknown:
            notes[f"the template reads no variable {name!r}"] = None
        known = {k: v for k, v in record.template_options.items() if k not in unknown}
        return replace(record, template_options=known) if unknown else record

    def _whole(
        self,
        record: PreferenceRecord,
        prompt: Sequence[Message],
        reply: Sequence[Message],
        asked: str,
        notes: dict[str, None],
    ) -> _Whole:
        """Render a conversation; find where its reply may begin and what of it is scored."""
        habits = self.template.habits(record.template_options)
        reply = [self._special.hide(message) for message in reply]

        def render(count: int, generate: bool = False) -> str:
            shown = self._as_taken([*prompt, *reply[:count]], habits)
            return self.template.try_render(
                record.id, shown, tools=record.tools, options=record.template_options,
                generate=generate,
            )  # fmt: skip

        text = render(len(reply))
        self._check_written(record.id, reply, text, (), record.template_options)
        end = self._end(record.id, text, habits)
        users = [i for i, m in enumerate(reply) if m["role"] == "user"]
        first = users[-1] + 1 if users and self.score == "last" else 0
        scored, starts = [], None
        for i, message in enumerate(reply):
            before = asked if i == 0 else None
            if message["role"] != "assistant" or (i < first and i > 0):
                continue
            if before is None:
                before = render(i, generate=True) + habits.adds
            places = self._starts(record.id, text, before, habits)
            begin = self._begin(record.id, text, message, places, habits, notes)
            starts = places if starts is None else starts
            if i < first:
                continue
            last = i == len(reply) - 1
            finish = (
                end
                if last
                else self._turn_end(record.id, text, begin, reply[i : i + 2], render(i + 1), habits)
            )
            if finish <= begin:
                raise self._refusal(record.id, "it writes a reply where none is expected")
            scored.append((begin, finish))
        assert starts is not None, "a reply begins with an assistant's message"
        return _Whole(text, starts, scored, end)

    def _starts(self, record_id: str, text: str, asked: str, habits: Habits) -> list[int]:
        """Where a prompt may end that was rendered as `asked`, longest first."""
        header = asked.removesuffix(habits.opens)
        if text.startswith(asked):
            return sorted({len(asked), len(header)}, reverse=True)
        if not text.startswith(header):
            header = without_opening(os.path.commonprefix([text, asked]))
            if not only_opens(asked[len(header) :]):
                raise self._refusal(
                    record_id, "it writes the prompt otherwise once a reply follows"
                )
        return [len(header)]

    def _begin(
        self,
        record_id: str,
        text: str,
        message: Message,
        starts: list[int],
        habits: Habits,
        notes: dict[str, None],
    ) -> int:
        """Where the scored part of an assistant's message begins; may add a place to `starts`."""
        thought, answer = thoughts_of(message)
        written = text.find(thought.strip(), starts[-1]) if thought.strip() else -1
        if thought.strip() and written < 0:
            notes["the template leaves out the reasoning of a reply"] = None
        wanted = self.reasoning == "yes" or (self.reasoning == "auto" and habits.opens_reasoning)
        if written >= 0 and not wanted:
            notes["the reasoning of a reply is not scored"] = None
            place = written + len(thought.strip())
            if answer.strip():
                place = text.find(answer.strip(), place)
            elif text.startswith(habits.closes, place):
                place += len(habits.closes)
            if place < 0:
                raise self._refusal(record_id, "it does not write a reply as it is")
            return place
        header = starts[-1]
        if written < 0 and habits.lead and text.startswith(habits.lead, header):
            if header + len(habits.lead) > starts[0]:
                starts.insert(0, header + len(habits.lead))
        return starts[0]

    def _end(self, record_id: str, text: str, habits: Habits) -> int:
        """Where the last turn of a rendered conversation ends, its end of turn included."""
        if text.endswith(habits.tail):
            return len(text) - len(habits.tail) + len(habits.end_of_turn)
        stripped = text.rstrip()
        if any(stripped.endswith(special) for special in self._special.names):
            return len(stripped)  # a call of a tool may end otherwise than a reply
        raise self._refusal(record_id, f"it does not end the reply with {habits.end_of_turn!r}")

    def _turn_end(
        self,
        record_id: str,
        text: str,
        begin: int,
        messages: Sequence[Message],
        until: str,
        habits: Habits,
    ) -> int:
        """Where a turn ends that another message follows; `until` is rendered up to the turn."""
        end = self._end(record_id, until, habits)
        if text.startswith(until[:end]):
            return end
        # The template writes an earlier turn otherwise than the last: look between the contents.
        content, following = (thoughts_of(message)[1].strip() for message in messages)
        place = text.find(content, begin) + len(content)
        limit = text.find(following, place)
        turn = text[place:limit]
        end = turn.find(habits.end_of_turn) + len(habits.end_of_turn)
        if not habits.end_of_turn or habits.end_of_turn not in turn:
            end = self._special.first(turn) if content else 0
        if not following or limit < 0 or not end:
            raise self._refusal(record_id, "it writes a turn otherwise once others follow")
        return place + end

    def _as_taken(self, messages: Iterable[Message], habits: Habits) -> list[Message]:
        """Return messages in the form that the template takes them in."""
        taken = [self._message(message, habits) for message in messages]
        if habits.folds_system:
            taken = fold_system(taken)
        return in_parts(taken) if habits.as_parts else taken

    def _message(self, message: Message, habits: Habits) -> Message:
        role = message["role"]
        if role == "developer" and not habits.knows_developer:
            return {**message, "role": "system"}
        if role != "assistant" or not habits.writes_reasoning or habits.takes_think_text:
            return message
        thought, answer = thoughts_of(message)
        if not thought or "reasoning_content" in message:
            return message
        return {**message, "reasoning_content": thought.strip("\n"), "content": answer}

    def _check_written(
        self,
        record_id: str,
        messages: Iterable[Message],
        text: str,
        tools: Sequence[dict[str, Any]],
        options: Mapping[str, Any],
    ) -> None:
        """Refuse a template that drops or rewrites what it was given."""
        if tools and not self.template.writes("tools", options):
            raise self._refusal(record_id, "it does not write tools")
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "assistant":
                content = thoughts_of(message)[1]
                if message.get("tool_calls") and not self.template.writes("tool_calls", options):
                    raise self._refusal(record_id, "it does not write tool_calls")
                for call in message.get("tool_calls", ()):
                    name = call.get("function", call).get("name", "")
                    if name not in text:
                        raise self._refusal(record_id, "it leaves out a call of a tool")
            elif role == "tool" and not self.template.writes("tool", options):
                raise self._refusal(record_id, "it does not write messages of role tool")
            content = content.strip()
            if content not in text and not _escaped_in(content, text):
                raise self._refusal(
                    record_id, f"it does not write a message of role {role} as it is"
                )

    def _refusal(self, record_id: str, reason: str) -> RefusedRecordError:
        return RefusedRecordError(record_id, reason, self.template.path)


def thoughts_of(message: Message) -> tuple[str, str]:
    """Return reasoning and answer of an assistant's message, in whichever form it has them."""
    content = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    block = THOUGHTS.match(content)
    return (block[1], content[block.end() :]) if block else ("", content)


def _common_start(wholes: Sequence[_Whole]) -> int:
    """The longest prompt that all conversations of a record begin with."""
    shared = len(os.path.commonprefix([whole.text for whole in wholes]))
    candidates = set(wholes[0].starts).union(*(whole.starts for whole in wholes))
    limit = min(whole.scored[0][0] for whole in wholes)
    # The header of a reply is a place for all of them.
    return max(c for c in candidates if c <= min(shared, limit))


def _escaped_in(content: str, text: str) -> bool:
    """Whether a template wrote a content as a JSON string."""
    return any(json.dumps(content, ensure_ascii=flag)[1:-1] in text for flag in (False, True))
