"""Readers of the forms of preference records; `forms` says which one reads a record."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.records.conversations import (
    common_head,
    conversation,
    prompt_beside,
    prompt_messages,
)
from megatron_infifpo.records.messages import (
    SYSTEM_ROLES,
    BadRecordError,
    Message,
    from_json,
    kind,
    read_messages,
    short,
    text_of,
)
from megatron_infifpo.records.read_report import RATED

# What stands between the turns of HelpSteer2's prompts.
HELPSTEER2_TURN = re.compile(r"\n<extra_id_1>(?:User|Assistant)\n")
MOST_SCORE = 1e18  # its square is a float32
PROMPTS = ("prompt", "conversations", "messages", "question", "instruction", "input")
CHECKED_PROMPTS = ("prompt", "question", "instruction", "input")


@dataclass(slots=True)
class Parts:
    """What a form finds in a record.

    Attributes:
        prompt: messages; empty if the record has none.
        replies: messages of the better reply, and of the other one; of a list, of each response.
        used: fields that were read beside those that the form is known by.
        tools: schemas of functions that lie inside other fields, if any.
        listed: the field that holds a list of responses; None: it is a pair.
        scores: of each reply, NaN where it has none; None: there are none.
        cut: whether each reply was cut; (): none was.
    """

    prompt: tuple[Message, ...]
    replies: tuple[tuple[Message, ...], ...]
    used: tuple[str, ...] = ()
    tools: Any = None
    listed: str | None = None
    scores: tuple[float, ...] | None = None
    cut: tuple[bool, ...] = ()


def read_pair(value: dict[str, Any], ignored: set[str], names: tuple[str, str]) -> Parts:
    """Read a prompt and two replies, or two conversations that begin with the prompt.

    The fields `prompt`, `conversations`, `messages`, `question`, `instruction` (with Alpaca's
    `input`) and `input` hold a prompt; the first of them counts. Pairs in `history` precede it.
    """
    both = read_both(value, names, ignored)
    return beside_prompt(value, [value[name] for name in names], both, names, ignored)


def beside_prompt(
    value: dict[str, Any],
    given: Sequence[Any],
    replies: Sequence[tuple[Message, ...]],
    names: Sequence[str],
    ignored: set[str],
) -> Parts:
    """Find the prompt of replies: in a field of its own, or in front of every one of them.

    Args:
        value: the record.
        given: the replies as the record has them.
        replies: their messages.
        names: of the replies, for errors.
        ignored: receives what nothing uses.
    """
    whole = [messages[0]["role"] != "assistant" for messages in replies]
    if not any(whole):
        for name in PROMPTS:
            if value.get(name) not in (None, [], {}):
                prompt, used = read_prompt(value, name, ignored)
                return Parts(prompt, tuple(replies), used)
        if all(isinstance(reply, str) for reply in given):
            raise BadRecordError(
                "field 'prompt' is missing or empty; expected it as a string or a list of messages "
                "(only whole conversations as responses may carry the prompt themselves)"
            )
        return Parts((), tuple(replies))
    if not all(whole):
        raise BadRecordError(
            f"field {names[whole.index(True)]!r} is a whole conversation and "
            f"{names[whole.index(False)]!r} a reply, expected all of the same kind"
        )
    head = common_head(replies, names)
    rest = tuple(messages[len(head) :] for messages in replies)
    for name in CHECKED_PROMPTS:
        if value.get(name) not in (None, "", [], {}):
            prompt, used = read_prompt(value, name, ignored)
            extra = prompt_beside(prompt, head, name, names)
            return Parts((*extra, *head), rest, used)
    return Parts(head, rest)


def read_both(
    value: dict[str, Any], names: tuple[str, str], ignored: set[str]
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Return the messages in two fields, the better reply's first."""
    first, second = names
    return conversation(value[first], first, ignored), conversation(value[second], second, ignored)


def read_prompt(
    value: dict[str, Any], name: str, ignored: set[str]
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Return the prompt in a field, and the fields that it is made of."""
    prompt = prompt_messages(value[name], name, ignored)
    used: tuple[str, ...] = (name,)
    more, history = value.get("input"), from_json(value.get("history"))
    if name == "instruction" and more:  # Alpaca's: what the instruction is about
        whole = f"{text_of(value[name], name)}\n{text_of(more, 'input')}"
        prompt, used = ({"role": "user", "content": whole},), (name, "input")
    if not history:
        return prompt, used
    if not isinstance(history, list) or not all(
        isinstance(turn, list) and len(turn) == 2 for turn in history
    ):
        if name != "instruction":  # something else may have that name
            return prompt, used
        raise BadRecordError(
            f"field 'history' is {kind(history)}, expected a list of [question, answer]"
        )
    return _after(history, prompt), (*used, "history")


def _after(history: list[list[Any]], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put earlier questions and answers before a prompt, if it does not begin with them."""
    first = next((i for i, m in enumerate(prompt) if m["role"] not in SYSTEM_ROLES), len(prompt))
    turns = tuple(
        {"role": role, "content": text_of(said, "history")}
        for turn in history
        for role, said in zip(("user", "assistant"), turn, strict=True)
    )
    rest = prompt[first:]
    there = len(rest) > len(turns) and rest[: len(turns)] == turns
    return (*prompt[:first], *(() if there else turns), *rest)


def read_by_sign(
    value: dict[str, Any], ignored: set[str], prompt: str, first: str, second: str, sign: str
) -> Parts:
    """Read two responses and a number: below 0 the first one is better, above 0 the second."""
    better = number(value[sign], sign)
    if better == 0:
        raise BadRecordError(f"no contrast: {sign!r} is 0, expected one better response")
    names = (first, second) if better < 0 else (second, first)
    return Parts(prompt_messages(value[prompt], prompt, ignored), read_both(value, names, ignored))


def read_helpsteer2(value: dict[str, Any], ignored: set[str]) -> Parts:
    """Read HelpSteer2's preferences, whose prompts of several turns are one text."""
    said = HELPSTEER2_TURN.split(text_of(value["prompt"], "prompt"))
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    names = {"first": "response_1", "second": "response_2", "sign": "preference_strength"}
    return read_by_sign(value | {"prompt": turns}, ignored, prompt="prompt", **names)


def read_by_name(
    value: dict[str, Any],
    ignored: set[str],
    prompt: str | None,
    replies: dict[str, str],
    winner: str,
) -> Parts:
    """Read two responses and what names the better one: `replies` has the field of each name."""
    won = str(value[winner]).strip()
    if won not in replies:
        raise BadRecordError(
            f"no contrast: {winner!r} is {short(value[winner])}, expected {' or '.join(replies)}"
        )
    (lost,) = replies.keys() - {won}
    fields = replies[won], replies[lost]
    if prompt is None:
        return read_pair({name: value[name] for name in fields}, ignored, fields)
    return Parts(prompt_messages(value[prompt], prompt, ignored), read_both(value, fields, ignored))


def read_by_score(
    value: dict[str, Any],
    ignored: set[str],
    prompt: str,
    answers: str,
    text: str,
    score: str,
    best: Callable = max,
    lists: bool = False,
) -> Parts:
    """Read a list of responses with scores or ranks.

    The best and the worst make a pair, the first one of ties. With `lists` all of them are read,
    each with its score; it may have none, and a rank counts as its negative.
    """
    items = from_json(value[answers])
    needed = (text,) if lists else (text, score)
    expected = f"a list of objects with {' and '.join(needed)}"
    if not isinstance(items, list):
        raise BadRecordError(f"field {answers!r} is {kind(items)}, expected {expected}")
    for i, item in enumerate(items):
        name = f"{answers}[{i}]"
        if not isinstance(item, dict):
            raise BadRecordError(f"field {name!r} is {kind(item)}, expected {expected}")
        for key in needed:
            if item.get(key) is None:
                state = "null" if key in item else "missing"
                hint = " (--lists reads responses without one, too)" if key == score else ""
                raise BadRecordError(f"field '{name}.{key}' is {state}, expected {expected}{hint}")
    to_score = number_or_nan if lists else number
    scores = [to_score(item.get(score), f"{answers}[{i}].{score}") for i, item in enumerate(items)]
    if not lists and len(set(scores)) < 2:
        raise BadRecordError(
            f"no contrast: the {len(items)} responses in {answers!r} have {len(set(scores))} "
            f"different values of {score}, expected at least two"
        )
    ignored |= {f"{answers}.{key}" for item in items for key in item if key not in (text, score)}
    if not lists and len(items) > 2:
        ignored.add(RATED)
    given = [(items[i][text], f"{answers}[{i}].{text}") for i in range(len(items))]
    if not lists:
        worst = min if best is max else max
        given = [given[scores.index(of(scores))] for of in (best, worst)]
    replies = tuple(conversation(said, name, ignored) for said, name in given)
    found = Parts(prompt_messages(value[prompt], prompt, ignored), replies)
    if lists:
        found.listed = answers
        found.scores = known_scores(scores if best is max else [0 - rank for rank in scores])
    return found


def read_openai(value: dict[str, Any], ignored: set[str]) -> Parts:
    """Read OpenAI's format for preference tuning."""
    given = from_json(value["input"])
    if not isinstance(given, dict) or not isinstance(given.get("messages"), list):
        raise BadRecordError(f"field 'input' is {kind(given)}, expected an object with messages")
    ignored |= {f"input.{key}" for key in given if key not in ("messages", "tools")}
    replies = read_both(value, ("preferred_output", "non_preferred_output"), ignored)
    prompt = read_messages(given["messages"], "input.messages", ignored)
    return Parts(prompt, replies, tools=given.get("tools"))


def read_messages_and_rejected(value: dict[str, Any], ignored: set[str]) -> Parts:
    """Read ms-swift's form: a conversation whose last message is the chosen reply."""
    messages = conversation(value["messages"], "messages", ignored)
    rejected = conversation(value["rejected_response"], "rejected_response", ignored)
    return Parts(messages[:-1], (messages[-1:], rejected))


def number(value: Any, name: str) -> float:
    """Return a finite number, which may be written as a text."""
    try:
        found = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRecordError(f"field {name!r} is {kind(value)}, expected a number")
    return found


def number_or_nan(value: Any, name: str) -> float:
    """Return a finite number, or NaN where there is none: null, or NaN as tables have it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan
    return number(value, name)


def known_scores(scores: Sequence[float]) -> tuple[float, ...] | None:
    """Return scores, or None where all of them are NaN.

    Raises:
        BadRecordError: one is too large for the arithmetic of training.
    """
    for score in scores:
        if abs(score) > MOST_SCORE:
            raise BadRecordError(
                f"a score is {score!r}, expected one of at most {MOST_SCORE:g} in size"
            )
    return None if all(map(math.isnan, scores)) else tuple(scores)
