"""Conversations in preference records: their prompt, and the replies that follow it."""

import re
from collections.abc import Sequence
from typing import Any

from megatron_infifpo.records.messages import (
    SYSTEM_ROLES,
    BadRecordError,
    Message,
    messages_in_text,
    read_messages,
    reply,
    short,
    text_of,
)

TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def conversation(value: Any, name: str, ignored: set[str]) -> tuple[Message, ...]:
    """Return a reply's or a conversation's messages: a string is a reply, if it is not one of
    Anthropic's conversations or the JSON of messages."""
    if isinstance(value, str):
        found = messages_in_text(value)
        if found is None:
            turns = anthropic_turns(text_of(value, name))
            if not value.strip():
                raise BadRecordError(
                    f"field {name!r} is empty ({short(value)}), expected a response with text"
                )
            return turns or reply(value)
        value = found
    messages = read_messages([value] if isinstance(value, dict) else value, name, ignored)
    if not messages:
        raise BadRecordError(f"field {name!r} is an empty list, expected messages")
    return messages


def prompt_messages(value: Any, name: str, ignored: set[str]) -> tuple[Message, ...]:
    """Return a prompt's messages; a string is one user message, or Anthropic's turns."""
    if isinstance(value, str):
        found = messages_in_text(value)
        if found is None:
            turns = anthropic_turns(text_of(value, name))
            return turns or ({"role": "user", "content": value},)
        value = found
    return read_messages([value] if isinstance(value, dict) else value, name, ignored)


def anthropic_turns(text: str) -> tuple[Message, ...]:
    r"""Split "\n\nHuman: ...\n\nAssistant: ..." in turns; () where a text is no such conversation.

    An open turn of the assistant at the end, as prompts have it, is left out.
    """
    if "\n\nAssistant:" not in text or not text.lstrip().startswith("Human:"):
        return ()
    pieces = TURN.split(text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if turns[-1] == {"role": "assistant", "content": ""}:
        turns.pop()
    return tuple(turns)


def common_head(
    conversations: Sequence[Sequence[Message]], names: Sequence[str]
) -> tuple[Message, ...]:
    """Return the prompt of conversations: their common messages before the assistant's.

    It ends with a user's or a tool's message, and all go on with the assistant's.
    """
    for messages, name in zip(conversations, names, strict=True):
        if messages[-1]["role"] != "assistant":
            raise BadRecordError(
                f"{name!r} ends with a message of role {messages[-1]['role']}, expected the "
                "assistant's reply"
            )
    one, *others = conversations
    shortest, length = min(map(len, conversations)) - 1, 0
    while length < shortest and all(other[length] == one[length] for other in others):
        length += 1
    first = length
    while length and not (
        all(messages[length]["role"] == "assistant" for messages in conversations)
        and one[length - 1]["role"] != "assistant"
    ):
        length -= 1
    starts = [messages[first]["role"] for messages in conversations]
    if not length or not {"assistant", "tool"}.issuperset(starts):
        number = next((i for i, other in enumerate(others, 1) if other[first] != one[first]), 1)
        raise BadRecordError(
            f"{names[0]!r} ({len(one)} messages) and {names[number]!r} "
            f"({len(conversations[number])}) differ first in message {first} (of roles "
            f"{starts[0]} and {starts[number]}), expected one common prompt and then the "
            "assistant's replies"
        )
    return tuple(one[:length])


def prompt_beside(
    prompt: tuple[Message, ...], head: tuple[Message, ...], name: str, names: Sequence[str]
) -> tuple[Message, ...]:
    """Compare a prompt with the conversations it stands beside.

    Returns the system message that only the prompt has, or nothing.
    """
    said, own = (
        [(m["role"], m["content"].strip()) for m in messages if m["role"] not in SYSTEM_ROLES]
        for messages in (prompt, head)
    )
    # A text beside a conversation of several turns may be any of its questions.
    if own[: len(said)] != said and not (len(said) == 1 and said[0] in own):
        first = next((i for i, m in enumerate(said) if own[i : i + 1] != [m]), 0)
        there = own[first][1] if first < len(own) else None
        raise BadRecordError(
            f"field {name!r} has {short(said[first][1])}, where the conversations in {names[0]!r} "
            f"and {names[1]!r} have {short(there) if there is not None else 'no question'}; "
            f"expected the same prompt; leave {name!r} out if the conversations are right"
        )
    return system_before([m for m in prompt if m["role"] in SYSTEM_ROLES], head, name)


def system_before(
    system: Sequence[Message], messages: tuple[Message, ...], name: str
) -> tuple[Message, ...]:
    """Return the system message to put before messages: none where they begin with the same."""
    if not system:
        return ()
    own = [m for m in messages if m["role"] in SYSTEM_ROLES]
    if not own:
        return tuple(system)
    if [m["content"].strip() for m in own] != [m["content"].strip() for m in system]:
        raise BadRecordError(
            f"field {name!r} has the system message {short(system[0]['content'])}, but the "
            f"conversation has {short(own[0]['content'])}; expected one system message"
        )
    return ()
