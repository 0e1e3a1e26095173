"""The habits of a chat template, and the forms in which templates take messages."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_infifpo.records.records import Message

# Reasoning at the start of a text; its opening mark may have been part of the prompt.
_THOUGHTS = re.compile(
    r"\A\s*(?:<think>(.*?)</think>|((?:(?!<think>).)*?\n)</think>(?=\s*(?:\n|\Z)))\s*", re.DOTALL
)
_MARK = r"[<\[][^<>\[\]\n]*(?:think|thought|reason)[^<>\[\]\n]*[>\]]?\s*"
# The mark that opens a block of reasoning, at the end of a text; it may be cut short.
_OPENING = re.compile(rf"{_MARK}\Z", re.IGNORECASE)
_MARKS = re.compile(rf"\s*(?:{_MARK})+\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Habits:
    """What a template does with one set of options.

    Attributes:
        opens: what the generation prompt writes that not every finished reply has behind it, such
            as "<think>\\n".
        adds: the header of a reply, of a template that takes no notice of the generation prompt.
        header: what stands between the user's message and the reply, up to the lead.
        gap: the lead, or the white space in its place.
        lead: what stands between the header of a reply and its text, such as an empty think block;
            "" where that is nothing or white space.
        tail: what follows a reply.
        end_of_turn: the part of the tail that a model generates; "" if there is none.
        writes_reasoning: it writes `reasoning_content`.
        takes_think_text: it writes `<think>` text as it writes `reasoning_content`.
        opens_reasoning: replies of this model begin with a block of reasoning.
        thinks: what stands between the header of a reply and its reasoning.
        closes: what stands between the reasoning and the answer.
        folds_system: it knows no system messages.
        knows_developer: it writes messages of role developer.
        as_parts: it prints contents only as lists of parts.
    """

    opens: str
    adds: str
    header: str
    gap: str
    lead: str
    tail: str
    end_of_turn: str
    writes_reasoning: bool
    takes_think_text: bool
    opens_reasoning: bool
    thinks: str
    closes: str
    folds_system: bool
    knows_developer: bool
    as_parts: bool


@dataclass(frozen=True, slots=True)
class Said:
    """What an assistant's message says.

    Attributes:
        thought: its reasoning, in whichever form it has it.
        answer: the text behind it.
        block: the reasoning with its marks, as it stands at the start of the text; "" if it has a
            field of its own.
    """

    thought: str
    answer: str
    block: str = ""


def said_in(message: Message) -> Said:
    """Read an assistant's message."""
    content = message["content"]
    if message.get("reasoning_content"):
        return Said(message["reasoning_content"], content)
    found = _THOUGHTS.match(content) if "</think>" in content else None
    if found is None:
        return Said("", content)
    return Said(found[1] or found[2] or "", content[found.end() :], found[0])


def without_opening(text: str) -> str:
    """Return a text without the mark at its end that opens a block of reasoning."""
    return _OPENING.sub("", text)


def only_opens(text: str) -> bool:
    """Whether a text is marks of reasoning and nothing else."""
    return _MARKS.match(text) is not None


def fold_system(messages: Iterable[Message]) -> list[Message]:
    """Put a leading system message before the first user message, for templates without one."""
    first, *rest = messages
    place = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first["role"] != "system" or place is None:
        return [first, *rest]
    asked = rest[place]
    joined = "\n\n".join(text for text in (first["content"], asked["content"]) if text)
    return [*rest[:place], {**asked, "content": joined}, *rest[place + 1 :]]


def in_parts(messages: Iterable[Message]) -> list[Message]:
    """Return messages with their contents as lists of parts, as templates of vision models ask."""
    return [{**m, "content": [{"type": "text", "text": m.get("content", "")}]} for m in messages]


def as_taken(messages: Iterable[Message], habits: Habits) -> list[Message]:
    """Return messages in the form that a template takes them in."""
    taken = [_message(message, habits) for message in messages]
    if habits.folds_system:
        taken = fold_system(taken)
    return in_parts(taken) if habits.as_parts else taken


def _message(message: Message, habits: Habits) -> Message:
    role = message["role"]
    if role == "developer" and not habits.knows_developer:
        return {**message, "role": "system"}
    if role != "assistant" or not habits.writes_reasoning or habits.takes_think_text:
        return message
    said = said_in(message)
    if not said.block:
        return message
    thought = said.thought.strip("\n")
    given = {"reasoning_content": thought} if thought.strip() else {}
    return {**message, **given, "content": said.answer}
