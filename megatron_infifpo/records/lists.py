"""Lists of responses, such as `infifpo sample` writes, and columns beside responses.

A column is a list with one entry a response: scores, finish reasons, reasoning, calls of tools.
"""

from collections.abc import Sequence
from typing import Any

from megatron_infifpo.records.conversations import conversation
from megatron_infifpo.records.fields import is_reply
from megatron_infifpo.records.form_readers import (
    Parts,
    beside_prompt,
    known_scores,
    number_or_nan,
)
from megatron_infifpo.records.messages import (
    BadRecordError,
    Message,
    from_json,
    kind,
    read_messages,
    short,
)

# Judges' numbers, by the names that data sets give them.
SCORES = ("scores", "rewards")
# What infifpo sample says of its responses; where one of them is there, texts are nothing else.
SAMPLED = ("finish_reasons", "reasoning", "tool_calls")
# What it says of itself.
ABOUT = ("model", "asked", "missing", "left_out", "extra")
NO_REPLIES = "(responses without an answer, or with marks of a template)"
CUT = "length"
FINISHES = ("stop", "tool_calls", "unknown", CUT)


def read_list(value: dict[str, Any], ignored: set[str]) -> Parts:
    """Read a prompt and a list of responses: texts, replies, or conversations with the prompt."""
    given = from_json(value["responses"])
    if not isinstance(given, list):
        raise BadRecordError(f"field 'responses' is {kind(given)}, expected a list of responses")
    names = [f"responses[{i}]" for i in range(len(given))]
    sampled = any(value.get(name) is not None for name in SAMPLED)
    thoughts, calls = (column(value, name, len(given)) for name in SAMPLED[1:])
    replies = [
        _sampled(*parts, ignored) if sampled else conversation(parts[0], parts[1], ignored)
        for parts in zip(given, names, thoughts, calls, strict=True)
    ]
    kept = list(range(len(given)))
    if sampled:  # one that was cut within its reasoning, say, is none, and the others are
        kept = [i for i in kept if len(replies[i]) != 1 or is_reply(replies[i][0])]
        ignored |= {NO_REPLIES} if len(kept) < len(given) else set()
    check_count(kept, "responses")
    scored = next((name for name in SCORES if value.get(name) is not None), SCORES[0])
    scores, cut = read_scores(value, scored, len(given)), read_cut(value, len(given))
    parts = beside_prompt(
        value,
        [given[i] for i in kept],
        [replies[i] for i in kept],
        [names[i] for i in kept],
        ignored,
    )
    parts.listed = "responses"
    parts.scores = scores and known_scores([scores[i] for i in kept])
    marks = tuple(cut[i] for i in kept if cut)
    parts.cut = marks if any(marks) else ()
    parts.used += (scored, *(SAMPLED + ABOUT if sampled else ()))
    return parts


def _sampled(
    said: Any, name: str, thought: Any, calls: Any, ignored: set[str]
) -> tuple[Message, ...]:
    """Return the reply of one response with its entries in the columns; a text is a text."""
    if not isinstance(said, str):
        if thought or calls:
            raise BadRecordError(
                f"{name!r} is {kind(said)} beside an entry of 'reasoning' or 'tool_calls', "
                "expected a text"
            )
        return conversation(said, name, ignored)
    message = {"role": "assistant", "content": said}
    message |= {"reasoning_content": thought, "tool_calls": calls}
    return read_messages([message], name, ignored)


def check_count(responses: Sequence[Any], name: str) -> None:
    """Refuse lists that leave nothing to compare."""
    if len(responses) < 2:
        raise BadRecordError(
            f"field {name!r} is a list of {len(responses)}, expected at least 2 responses that "
            "have an answer; --on-bad-record skip leaves such records out"
        )


def column(value: dict[str, Any], name: str, count: int) -> list[Any]:
    """Return a field's entries, one a response; null of each where the field is absent."""
    found = from_json(value.get(name))
    if found is None:
        return [None] * count
    if not isinstance(found, list) or len(found) != count:
        is_there = f"a list of {len(found)}" if isinstance(found, list) else kind(found)
        raise BadRecordError(
            f"field {name!r} is {is_there}, expected a list with one entry for each of the {count} "
            "responses"
        )
    return found


def read_scores(value: dict[str, Any], name: str, count: int) -> tuple[float, ...] | None:
    """Return a column of numbers, NaN for null; None where there is no number."""
    entries = column(value, name, count)
    return known_scores([number_or_nan(x, f"{name}[{i}]") for i, x in enumerate(entries)])


def read_cut(value: dict[str, Any], count: int) -> tuple[bool, ...]:
    """Return which responses were cut by their finish reasons; () where none was."""
    reasons = column(value, "finish_reasons", count)
    for i, reason in enumerate(reasons):
        if reason is not None and reason not in FINISHES:
            raise BadRecordError(
                f"'finish_reasons[{i}]' is {short(reason)}, expected one of {', '.join(FINISHES)} "
                f"({CUT!r}: it was cut); leave out what ended otherwise"
            )
    cut = tuple(reason == CUT for reason in reasons)
    return cut if any(cut) else ()
