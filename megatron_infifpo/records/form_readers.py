"""Readers of the forms of preference records; `forms` says which one reads a record."""

import math
import re
from collections.abc import Callable
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

# What stands between the turns of HelpSteer2's prompts.
HELPSTEER2_TURN = re.compile(r"\n<extra_id_1>(?:User|Assistant)\n")
PROMPTS = ("prompt", "conversations", "messages", "question", "instruction", "input")
CHECKED_PROMPTS = ("prompt", "question", "instruction", "input")


@dataclass(slots=True)
class Parts:
    """What a form finds in a record.

    Attributes:
        prompt: messages; empty if the record has none.
        replies: messages of the better reply, and of the other one.
        used: fields that were read beside those that the form is known by.
        tools: schemas of functions that lie inside other fields, if any.
    """

    prompt: tuple[Message, ...]
    replies: tuple[tuple[Message, ...], tuple[Message, ...]]
    used: tuple[str, ...] = ()
    tools: Any = None


def read_pair(value: dict[str, Any], ignored: set[str], names: tuple[str, str]) -> Parts:
    """Read a prompt and two replies, or two conversations that begin with the prompt.

    The fields `prompt`, `conversations`, `messages`, `question`, `instruction` (with Alpaca's
    `input`) and `input` hold a prompt; the first of them counts. Pairs in `history` precede it.
    """
    both = read_both(value, names, ignored)
    whole = [messages[0]["role"] != "assistant" for messages in both]
    if not any(whole):
        for name in PROMPTS:
            if value.get(name) not in (None, [], {}):
                prompt, used = read_prompt(value, name, ignored)
                return Parts(prompt, both, used)
        if all(isinstance(value[name], str) for name in names):
            raise BadRecordError(
                "field 'prompt' is missing or empty; expected it as a string or a list of messages "
                "(only conversations in 'chosen' and 'rejected' may carry the prompt themselves)"
            )
        return Parts((), both)
    if not all(whole):
        raise BadRecordError(
            f"field {names[whole.index(True)]!r} is a whole conversation and "
            f"{names[whole.index(False)]!r} a reply, expected two of the same"
        )
    head = common_head(*both, names)
    replies = both[0][len(head) :], both[1][len(head) :]
    for name in CHECKED_PROMPTS:
        if value.get(name) not in (None, "", [], {}):
            prompt, used = read_prompt(value, name, ignored)
            extra = prompt_beside(prompt, head, name, names)
            return Parts((*extra, *head), replies, used)
    return Parts(head, replies)


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
) -> Parts:
    """Read a list of responses with scores or ranks: the best and the worst; ties: the first."""
    items = from_json(value[answers])
    if not isinstance(items, list) or not all(
        isinstance(i, dict) and i.get(text) is not None and i.get(score) is not None for i in items
    ):
        raise BadRecordError(
            f"field {answers!r} is {kind(items)}, expected a list of objects with {text} and "
            f"{score}"
        )
    scores = [number(item[score], f"{answers}.{score}") for item in items]
    if len(set(scores)) < 2:
        raise BadRecordError(
            f"no contrast: the {len(items)} responses in {answers!r} have {len(set(scores))} "
            f"different values of {score}, expected at least two"
        )
    worst = min if best is max else max
    ignored |= {f"{answers}.{key}" for item in items for key in item if key not in (text, score)}

    def reply_with(wanted: float) -> tuple[Message, ...]:
        place = scores.index(wanted)
        return conversation(items[place][text], f"{answers}[{place}].{text}", ignored)

    replies = reply_with(best(scores)), reply_with(worst(scores))
    return Parts(prompt_messages(value[prompt], prompt, ignored), replies)


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
