"""A record as its template renders it: the prompt, the replies, and which of their text is scored.

The rule: prompt and reply are a prefix of what the template renders for that very conversation.
Each conversation of a record is rendered once, and its prompt where it cannot be read off there.

- The prompt ends with the generation prompt, and with what the template then writes before the
  text of every reply of the record (an empty think block).
- Where the generation prompt opens a block that a finished reply does not have, the prompt ends
  before that block.
- The reply ends with the end of turn that the template writes; it may write none. Of a reply that
  was cut it is there, but not scored: the model has not said it.
- What cannot be placed in the rendered text is refused, never guessed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import Message, PreferenceRecord
from megatron_infifpo.tokens.chat_template import ChatTemplate, RefusedRecordError
from megatron_infifpo.tokens.habits import Habits, as_taken, said_in
from megatron_infifpo.tokens.special_text import SpecialText
from megatron_infifpo.tokens.turns import (
    RewrittenError,
    Whole,
    answer_start,
    asked_before,
    check_written,
    common_start,
    earlier_end,
    holds,
    last_end,
    later_ends,
    leaves_out_reasoning,
    prompt_ends,
)

SCORE, REASONING = ("last", "all"), ("auto", "yes", "no")


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
        record = PreferenceRecord(
            record_id,
            "",
            tuple(messages),
            (),
            tools=tuple(tools),
            template_options=dict(options or {}),
        )
        record = self._with_known_options(record, {})
        try:
            self._check_able(record, record.prompt)
            return self._prompt(record)
        except RewrittenError as error:
            raise RefusedRecordError(record_id, str(error), self.template.path) from None

    def conversation(
        self, messages: Iterable[Message], record_id: str, *, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        """Return a whole conversation, nothing of which the template leaves out.

        Raises:
            RefusedRecordError: the template cannot render it, or drops or rewrites some of it.
        """
        record = PreferenceRecord(record_id, "", tuple(messages), (), tools=tuple(tools))
        try:
            self._check_able(record, record.prompt)
            text = self._render(record, ())
            check_written(record.prompt, text)
        except RewrittenError as error:
            raise RefusedRecordError(record_id, str(error), self.template.path) from None
        return text

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
        record = replace(record, prompt=tuple(prompt))
        try:
            self._check_able(record, (m for messages in (prompt, *replies) for m in messages))
            replies = tuple(tuple(map(self._special.hide, reply)) for reply in replies)
            texts = [self._render(record, reply) for reply in replies]
            for reply, text in zip(replies, texts, strict=True):
                check_written([*prompt, *reply], text)
            if leaves_out_reasoning(prompt, texts[0]):
                notes["the template leaves out the reasoning of an earlier turn"] = None
            asked = self._asked(record, texts[0], replies[0])
            cuts = record.cut or (False,) * len(replies)
            wholes = [
                self._whole(record, reply, text, asked, notes, cut)
                for reply, text, cut in zip(replies, texts, cuts, strict=True)
            ]
        except RewrittenError as error:
            raise RefusedRecordError(record.id, str(error), self.template.path) from None
        start = common_start(wholes)
        if start < len(asked):
            opens = f"the prompt ends before {asked[start:]!r}"
            notes[f"{opens}, which the template opens for new replies"] = None
        return Rendering(
            wholes[0].text[:start],
            tuple(
                Reply(w.text[start : w.end], tuple((a - start, b - start) for a, b in w.scored))
                for w in wholes
            ),
            tuple(notes),
        )

    def _render(
        self, record: PreferenceRecord, reply: Sequence[Message], *, generate: bool = False
    ) -> str:
        """Render a record's prompt with messages behind it."""
        options = record.template_options
        shown = as_taken([*record.prompt, *reply], self.template.habits(options))
        return self.template.try_render(
            record.id, shown, tools=record.tools, options=options, generate=generate
        )

    def _asked(self, record: PreferenceRecord, text: str, reply: Sequence[Message]) -> str:
        """Return the prompt with its generation prompt, by `text` where that is enough."""
        habits = self.template.habits(record.template_options)
        found = asked_before(text, reply[0], habits) if len(reply) == 1 else None
        return self._prompt(record) if found is None else found

    def _prompt(self, record: PreferenceRecord) -> str:
        text = self._render(record, (), generate=True)
        check_written(record.prompt, text)
        return text + self.template.habits(record.template_options).adds

    def _with_known_options(
        self, record: PreferenceRecord, notes: dict[str, None]
    ) -> PreferenceRecord:
        """Leave out options that this template does not read: they are for other models."""
        unknown = [name for name in record.template_options if not self.template.reads(name)]
        for name in unknown:
            notes[f"the template reads no variable {name!r}"] = None
        known = {k: v for k, v in record.template_options.items() if k not in unknown}
        try:
            self.template.habits(known)
        except UserError as error:
            raise RefusedRecordError(record.id, f"its options: {error}") from None
        return replace(record, template_options=known) if unknown else record

    def _whole(
        self,
        record: PreferenceRecord,
        reply: Sequence[Message],
        text: str,
        asked: str,
        notes: dict[str, None],
        cut: bool,
    ) -> Whole:
        """Find where the reply of a rendered conversation may begin and what of it is scored."""
        habits = self.template.habits(record.template_options)
        end, own_end = (last_end(text, habits, self._special, cut=c) for c in (False, cut))
        if own_end < end:
            notes["the end of turn of a response that was cut is not scored"] = None
        users = [i for i, m in enumerate(reply) if m["role"] == "user"]
        first = users[-1] + 1 if users and self.score == "last" else 0
        scored: list[tuple[int, int]] = []
        starts = prompt_ends(text, asked, habits)
        for i, message in enumerate(reply):
            if message["role"] != "assistant" or 0 < i < first:
                continue
            places = starts
            if i > 0:
                before, shown = (self._render(record, reply[:i], generate=g) for g in (False, True))
                since = scored[-1][1] if scored else starts[-1]
                places = later_ends(text, before, shown, reply[i - 1], since, habits)
            begin = self._begin(text, message, places, habits, notes)
            if i < first:
                continue
            finish = own_end
            if i < len(reply) - 1:
                until = self._render(record, reply[: i + 1])
                finish = earlier_end(text, places[-1], message, until, habits, self._special)
            after_others = begin >= (scored[-1][1] if scored else 0)
            answer = said_in(message).answer.strip()
            if not after_others or finish <= begin or not holds(text[begin:finish], answer):
                raise RewrittenError("it does not write a reply as it is")
            scored.append((begin, finish))
        return Whole(text, starts, scored, end)

    def _begin(
        self,
        text: str,
        message: Message,
        starts: list[int],
        habits: Habits,
        notes: dict[str, None],
    ) -> int:
        """Where the scored part of an assistant's message begins; may add a place to `starts`."""
        place, written = answer_start(text, starts[-1], message, habits)
        if written:
            wanted = {"yes": True, "no": False, "auto": habits.opens_reasoning}[self.reasoning]
            if wanted:
                return starts[0]
            notes["the reasoning of a reply is not scored"] = None
            return place
        if said_in(message).thought.strip():
            notes["the template leaves out the reasoning of a reply"] = None
        if place > starts[0]:
            starts.insert(0, place)
        return starts[0]

    def _check_able(self, record: PreferenceRecord, messages: Iterable[Message]) -> None:
        """Refuse what the template has no form for."""
        able, options = self.template.writes, record.template_options
        if record.tools and not able("tools", options):
            raise RewrittenError("it does not write tools")
        for message in messages:
            calls = message.get("tool_calls", ())
            if calls and not able("tool_calls", options):
                raise RewrittenError("it does not write tool_calls")
            if len(calls) > 1 and not able("several calls", options):
                raise RewrittenError("it writes one call of a message, not several")
            if message["role"] == "tool" and not able("tool", options):
                raise RewrittenError("it does not write messages of role tool")
