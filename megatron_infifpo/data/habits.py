"""The habits of a chat template, and the forms in which templates take messages."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_infifpo.data.records import Message

THOUGHTS = re.compile(r"\A\s*<think>(.*?)</think>\s*", re.DOTALL)
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
    closes: str
    folds_system: bool
    knows_developer: bool
    as_parts: bool


def without_opening(text: str) -> str:
    """Return a text without the mark at its end that opens a block of reasoning."""
    return _OPENING.sub("", text)


def only_opens(text: str) -> bool:
    """Whether a text is marks of reasoning and nothing else."""
    return _MARKS.match(text) is not None


def fold_system(messages: Iterable[Message]) -> list[Message]:
    """Put a leading system message before the first user message, for templates without one."""
    first, *rest = messages
    if first["role"] != "system" or not rest:
        return [first, *rest]
    joined = "\n\n".join(text for text in (first["content"], rest[0]["content"]) if text)
    return [{**rest[0], "content": joined}, *rest[1:]]


def in_parts(messages: Iterable[Message]) -> list[Message]:
    """Return messages with their contents as lists of parts, as templates of vision models ask."""
    return [{**m, "content": [{"type": "text", "text": m.get("content", "")}]} for m in messages]
