"""What a model answered: the text, the reasoning before it, and why it ended where it did."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.records.messages import BadRecordError, read_messages

# Around the reasoning, in what models write; those count that the model's own template has.
MARKERS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)
# gpt-oss writes messages: each begins with its channel, and the answer is the final one.
HARMONY = "<|channel|>"
_ANALYSIS = re.compile(r"<\|channel\|>analysis[^<]*<\|message\|>(.*?)(?:<\|end\|>|$)", re.DOTALL)
_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|message\|>")

# What servers call one and the same reason -> its name here.
FINISH = {
    "eos_token": "stop",
    "stop_sequence": "stop",
    "eos": "stop",
    "end_turn": "stop",
    "function_call": "tool_calls",
    "max_tokens": "length",
    "max_output_tokens": "length",
}
UNKNOWN = "unknown"  # the server does not say

# Why a response is not a whole one.
CUT, EMPTY, FILTERED, BROKEN, UNSENT, REFUSED, UNREAD_CALL = (
    "cut",
    "empty",
    "content_filter",
    "not Unicode",
    "not sent",
    "refused",
    "a tool call as text",
)


@dataclass(frozen=True, slots=True)
class Response:
    """One response.

    Attributes:
        text: the answer; without the reasoning before it.
        finish: why it ended: "stop", "length", "tool_calls", "content_filter", what else an engine
            says, or "unknown".
        reasoning: what the model wrote before its answer, without the markers around it.
        tool_calls: functions that it calls, as a server gives them.
    """

    text: str
    finish: str = "stop"
    reasoning: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()

    @property
    def fault(self) -> str | None:
        """Why it is no whole response; None for one that is."""
        if not is_unicode([self.text, self.reasoning, list(self.tool_calls)]):
            return BROKEN
        if self.finish == "length":
            return CUT
        if self.finish in (FILTERED, REFUSED, UNREAD_CALL):
            return self.finish
        if self.finish not in ("stop", "tool_calls", UNKNOWN):
            return f"ended by {self.finish}"
        return None if self.text.strip() or self.tool_calls else EMPTY

    @property
    def kept_if_cut(self) -> bool:
        """Whether it is cut, and says something all the same."""
        return self.fault == CUT and bool((self.text + (self.reasoning or "")).strip())

    def message(self) -> dict[str, Any]:
        """Return the assistant's message."""
        found: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.reasoning:
            found["reasoning_content"] = self.reasoning
        if self.tool_calls:
            found["tool_calls"] = list(self.tool_calls)
        return found


def from_choice(choice: Mapping[str, Any]) -> Response:
    """Read one choice of a server's answer.

    Raises:
        LookupError, TypeError: it is none.
    """
    message = choice["message"]
    finish = choice.get("finish_reason")
    text = message.get("content")
    if isinstance(text, list):  # parts of text
        text = "".join(part.get("text") or "" for part in text)
    # vLLM and SGLang have written `reasoning_content`, newer ones write `reasoning`.
    reasoning = next(
        (
            found
            for name in ("reasoning_content", "reasoning", "thinking")
            if isinstance(found := message.get(name), str) and found.strip()
        ),
        None,
    )
    finish = FINISH.get(finish, str(finish)) if finish else UNKNOWN
    calls = message.get("tool_calls") or []
    if calls:
        try:  # arguments as objects, as templates take them
            said = {"role": "assistant", "content": "", "tool_calls": calls}
            calls = read_messages([said], "tool_calls")[0]["tool_calls"]
        except BadRecordError:
            calls, finish = [], "a broken tool call"
    return Response(str(text or ""), finish, reasoning, tuple(calls))


def split_reasoning(text: str, template: str, prompt: str) -> tuple[str, str | None]:
    """Split what a model wrote into its answer and the reasoning before it.

    Args:
        text: with all special tokens, up to the end of the turn.
        template: the model's chat template; only markers that it knows are looked for.
        prompt: as it was rendered: it may have opened the reasoning already.

    Returns:
        (answer, reasoning); the answer is empty where the text ends within the reasoning, the
        reasoning is None where there is none.
    """
    if HARMONY in template and text.lstrip().startswith(HARMONY):
        final = _FINAL.search(text)
        before = text[: final.start()] if final else text
        reasoning = "\n".join(_ANALYSIS.findall(before)).strip("\n")
        return (text[final.end() :] if final else "", reasoning or None)
    for start, end in MARKERS:
        if end not in template:
            continue
        opened = prompt.rstrip().endswith(start)
        own = text.lstrip().startswith(start)
        if not (opened or own or end in text):
            continue
        inside = text.lstrip().removeprefix(start) if own else text
        reasoning, closed, answer = inside.partition(end)
        if not opened and not own and start in reasoning:
            continue  # a block in the middle of the answer is a part of it
        return answer.lstrip("\n") if closed else "", reasoning.strip("\n") or None
    return text, None


def is_unicode(value: Any) -> bool:
    """Whether UTF-8 can encode all text of a JSON value; it cannot with half a surrogate pair."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return False
        return True
    if isinstance(value, Mapping):
        return is_unicode([*value, *value.values()])
    return not isinstance(value, list | tuple) or all(map(is_unicode, value))
