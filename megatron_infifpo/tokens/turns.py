"""Where the turns of an assistant lie in a rendered conversation."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.records.messages import SYSTEM_ROLES
from megatron_infifpo.records.records import Message
from megatron_infifpo.tokens.habits import Habits, only_opens, said_in, without_opening
from megatron_infifpo.tokens.special_text import SpecialText


class RewrittenError(Exception):
    """A template writes a conversation so that what is scored cannot be placed; says how."""


@dataclass
class Whole:
    """A rendered conversation with one reply."""

    text: str
    starts: list[int]  # where its prompt may end, longest first
    scored: list[tuple[int, int]]
    end: int


def prompt_ends(text: str, asked: str, habits: Habits) -> list[int]:
    """Return where the prompt of a turn may end, longest first.

    Args:
        text: the rendered conversation.
        asked: the conversation before the turn, with the generation prompt.
        habits: of the template.

    Raises:
        RewrittenError: the conversation does not go on from there.
    """
    header = asked.removesuffix(habits.opens)
    if text.startswith(asked):
        return sorted({len(asked), len(header)}, reverse=True)
    if not text.startswith(header):
        header = without_opening(os.path.commonprefix([text, asked]))
        if not only_opens(asked[len(header) :]):
            raise RewrittenError("it writes the prompt otherwise once a reply follows")
    return [len(header)]


def later_ends(
    text: str, before: str, asked: str, message: Message, since: int, habits: Habits
) -> list[int]:
    """Return where the prompt of a turn may end that is not the first of its reply, longest first.

    Args:
        text: the rendered conversation.
        before: the conversation before the turn, rendered alone.
        asked: the same with the generation prompt.
        message: the one before the turn.
        since: where what was scored before ends.
        habits: of the template.

    Raises:
        RewrittenError: the turn cannot be found.
    """
    try:
        return prompt_ends(text, asked + habits.adds, habits)
    except RewrittenError:
        # An earlier turn is written otherwise: look for the header behind the message before.
        header = asked.removeprefix(before).removesuffix(habits.opens)
        place = written_until(text, message["content"].strip(), since)
        found = text.find(header, place)
        if not asked.startswith(before) or not header.strip() or place < 0 or found < 0:
            raise
        return [found + len(header)]


def asked_before(text: str, message: Message, habits: Habits) -> str | None:
    """Return what `text` continues, read off a rendered conversation that ends with plain text.

    It saves rendering the prompt, for templates that continue their generation prompt.

    Returns:
        The prompt as it is rendered with the generation prompt, or None where only the template
        can tell.
    """
    if habits.opens or len(message) > 2 or not text.endswith(habits.tail):
        return None
    body, content = text[: len(text) - len(habits.tail)], message["content"]
    if said_in(message).block:
        return None
    for written in (content, content.strip()):
        before = body[: len(body) - len(written)]
        if body.endswith(written) and before.endswith(habits.header + habits.gap):
            return before.removesuffix(habits.gap)
    return None


def last_end(text: str, habits: Habits, special: SpecialText, *, cut: bool = False) -> int:
    """Return where the last turn ends: behind its end of turn, which is not its own if it was cut.

    Raises:
        RewrittenError: it does not end as replies do.
    """
    if text.endswith(habits.tail):
        return len(text) - len(habits.tail) + (0 if cut else len(habits.end_of_turn))
    stripped = text.rstrip()
    ends = [name for name in special.names if stripped.endswith(name)]
    if ends:  # a call of a tool may end otherwise than a reply
        return len(stripped) - (len(max(ends, key=len)) if cut else 0)
    raise RewrittenError(f"it does not end the reply with {habits.end_of_turn!r}")


def earlier_end(
    text: str, header: int, message: Message, until: str, habits: Habits, special: SpecialText
) -> int:
    """Return where a turn ends that another message follows.

    Args:
        text: the rendered conversation.
        header: where the turn's header ends.
        message: the turn.
        until: the conversation rendered up to the turn.
        habits: of the template.
        special: tokens.

    Raises:
        RewrittenError: it cannot be told.
    """
    end = last_end(until, habits, special)
    if text.startswith(until[:end]):
        return end
    # The template writes an earlier turn otherwise than the last: go through what it holds.
    answer = said_in(message).answer.strip()
    place = _skip(text, answer_start(text, header, message, habits)[0])
    if message.get("tool_calls"):
        own = next((name for name in special.names if until[:end].endswith(name)), None)
        if own is not None and (found := text.find(own, place)) >= 0:
            return found + len(own)
    elif text.startswith(answer, place):
        place += len(answer)
        if not habits.end_of_turn:
            return place
        for start in (place, _skip(text, place)):
            if text.startswith(habits.end_of_turn, start):
                return start + len(habits.end_of_turn)
        if end := special.starts(text, _skip(text, place)):
            return end
    raise RewrittenError("it writes a turn otherwise once others follow")


def answer_start(text: str, header: int, message: Message, habits: Habits) -> tuple[int, bool]:
    """Return where a turn's answer or calls begin, and whether its reasoning stands before them.

    Args:
        text: the rendered conversation.
        header: where the turn's header ends.
        message: the turn.
        habits: of the template.

    Raises:
        RewrittenError: it cannot be told.
    """
    said, lead = said_in(message), header
    if habits.lead and text.startswith(habits.lead, header):
        lead += len(habits.lead)
    if said.block and not habits.writes_reasoning:  # text like any other
        place = _skip(text, lead)
        if text.startswith(said.block.strip(), place):
            return _skip(text, place + len(said.block.strip())), True
    elif habits.writes_reasoning:
        thought, opening = said.thought.strip(), habits.thinks.rstrip()
        place = _skip(text, header + len(opening))
        if thought and text.startswith(opening, header) and text.startswith(thought, place):
            place += len(thought)
            closing = _skip(text, place)
            if text.startswith(habits.closes.strip(), closing):
                return _skip(text, closing + len(habits.closes.strip())), True
            return place, True
    elif said.thought and message.get("tool_calls"):
        # Some templates write reasoning before calls only.
        thought = said.thought.strip()
        others = f"{said.answer} {message['tool_calls']}"
        if text.count(thought, header) and thought in others:
            raise RewrittenError("its reasoning cannot be told from its calls")
        if (place := text.find(thought, header)) >= 0:
            return place + len(thought), True
    return lead, False


def _skip(text: str, place: int) -> int:
    """Return the place behind white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def holds(text: str, content: str) -> bool:
    """Whether a template wrote a content, as it is or as a JSON string."""
    return written_until(text, content, 0) >= 0


def written_until(text: str, content: str, place: int) -> int:
    """Return where a content ends that is written from a place on, -1 if it is not.

    Templates write it as it is, or as a JSON string.
    """
    if (found := text.find(content, place)) >= 0:
        return found + len(content)
    for flag in (False, True):
        escaped = json.dumps(content, ensure_ascii=flag)[1:-1]
        if (found := text.find(escaped, place)) >= 0:
            return found + len(escaped)
    return -1


def common_start(wholes: Sequence[Whole]) -> int:
    """Return the longest prompt that all conversations of a record begin with."""
    limit = min(whole.scored[0][0] for whole in wholes)
    candidates = {start for whole in wholes for start in whole.starts if start <= limit}
    # The header of a reply, the last of its places, is there in all of them.
    return max(
        start
        for start in candidates
        if all(whole.text.startswith(wholes[0].text[:start]) for whole in wholes)
    )


def leaves_out_reasoning(prompt: Iterable[Message], text: str) -> bool:
    """Whether a template leaves out reasoning that a prompt's earlier turns have."""
    thoughts = (said_in(m).thought.strip() for m in prompt if m["role"] == "assistant")
    return not all(holds(text, thought) for thought in thoughts)


def check_written(messages: Iterable[Message], text: str) -> None:
    """Refuse what the template has dropped or rewritten: contents stand in their order.

    Args:
        messages: of a conversation.
        text: what the template has made of it.

    Raises:
        RewrittenError: a content, a call or its arguments are not in the text.
    """
    place = 0
    for message in messages:
        role, content = message["role"], message["content"]
        calls = message.get("tool_calls", ()) if role == "assistant" else ()
        if role == "assistant":
            content = said_in(message).answer
        # Some put the system's message before the user's last one.
        found = written_until(text, content.strip(), 0 if role in SYSTEM_ROLES else place)
        if found < 0:
            raise RewrittenError(f"it does not write a message of role {role} as it is")
        # What follows calls stands behind all of them, however they and the content are ordered.
        ends = [found, *(_call_end(text, call.get("function", call), place) for call in calls)]
        place = place if role in SYSTEM_ROLES else max(ends)


def _call_end(text: str, call: Mapping[str, Any], place: int) -> int:
    """Return where a call ends that is written from a place on, in whichever notation.

    Raises:
        RewrittenError: its name, or a word of its arguments, is not there.
    """
    end = text.find(call.get("name", ""), place)
    if end < 0:
        raise RewrittenError("it leaves out a call of a tool")
    for word in _words(call.get("arguments", {})):
        found = written_until(text, word, place)
        if found < 0:
            raise RewrittenError("it leaves out arguments of a call of a tool")
        end = max(end, found)
    return end


def _words(value: Any) -> Iterator[str]:
    """Words of a JSON value; true, false and null are spelled in too many ways."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)
    elif isinstance(value, str) or type(value) in (int, float):
        yield from re.findall(r"\w+", str(value))
