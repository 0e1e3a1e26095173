"""Where the turns of an assistant lie in a rendered conversation."""

import json
import os
from collections.abc import Sequence

from megatron_infifpo.data.habits import THOUGHTS, Habits, only_opens, without_opening
from megatron_infifpo.data.records import Message
from megatron_infifpo.data.special_text import SpecialText


class RewrittenError(Exception):
    """A template writes a conversation so that what is scored cannot be placed; says how."""


def thoughts_of(message: Message) -> tuple[str, str]:
    """Return reasoning and answer of an assistant's message, in whichever form it has them."""
    content = message["content"]
    if message.get("reasoning_content"):
        return message["reasoning_content"], content
    block = THOUGHTS.match(content)
    return (block[1], content[block.end() :]) if block else ("", content)


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
    if THOUGHTS.match(content):
        return None
    for written in (content, content.strip()):
        before = body[: len(body) - len(written)]
        if body.endswith(written) and before.endswith(habits.header + habits.gap):
            return before.removesuffix(habits.gap)
    return None


def last_end(text: str, habits: Habits, special: SpecialText) -> int:
    """Return where the last turn ends, its end of turn included.

    Raises:
        RewrittenError: it does not end as replies do.
    """
    if text.endswith(habits.tail):
        return len(text) - len(habits.tail) + len(habits.end_of_turn)
    stripped = text.rstrip()
    if any(stripped.endswith(name) for name in special.names):
        return len(stripped)  # a call of a tool may end otherwise than a reply
    raise RewrittenError(f"it does not end the reply with {habits.end_of_turn!r}")


def earlier_end(
    text: str,
    begin: int,
    messages: Sequence[Message],
    until: str,
    habits: Habits,
    special: SpecialText,
) -> int:
    """Return where a turn ends that another message follows.

    Args:
        text: the rendered conversation.
        begin: of the turn.
        messages: of the turn, and the one that follows.
        until: the conversation rendered up to the turn.
        habits: of the template.
        special: tokens.

    Raises:
        RewrittenError: it cannot be told.
    """
    end = last_end(until, habits, special)
    if text.startswith(until[:end]):
        return end
    # The template writes an earlier turn otherwise than the last: look between the contents.
    content, following = (thoughts_of(message)[1].strip() for message in messages)
    place = text.find(content, begin) + len(content)
    limit = text.find(following, place)
    turn = text[place:limit]
    end = turn.find(habits.end_of_turn) + len(habits.end_of_turn)
    if not habits.end_of_turn or habits.end_of_turn not in turn:
        end = special.first(turn) if content else 0
    if not following or limit < 0 or not end:
        raise RewrittenError("it writes a turn otherwise once others follow")
    return place + end


def reasoning_end(text: str, begin: int, message: Message, habits: Habits) -> int:
    """Return where the answer behind a turn's reasoning begins; 0 if no reasoning is written.

    Raises:
        RewrittenError: the answer is not behind the reasoning.
    """
    thought, answer = (part.strip() for part in thoughts_of(message))
    place = text.find(thought, begin) if thought else -1
    first = text.find(answer, begin) if answer else len(text)
    if place < 0 or place > first >= 0:
        return 0
    place += len(thought)
    if answer:
        behind = text.find(answer, place)
        if behind < 0 and not thought.startswith(answer) and not answer.startswith(thought):
            raise RewrittenError("it does not write a reply as it is")
        return max(behind, 0)
    return place + (len(habits.closes) if text.startswith(habits.closes, place) else 0)


def holds(text: str, content: str) -> bool:
    """Whether a template wrote a content, as it is or as a JSON string."""
    escaped = (json.dumps(content, ensure_ascii=flag)[1:-1] for flag in (False, True))
    return content in text or any(found in text for found in escaped)
