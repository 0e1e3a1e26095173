"""Small conversations, with and without tools."""

from typing import Any

from megatron_infifpo.records.messages import Message

type Object = dict[str, Any]


def said(*turns: str) -> list[Message]:
    """Messages from "s:", "u:", "a:", "t:" and their text."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


SUM: Object = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
CALL: Object = {"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": 1}}}
CALLING: Object = {"role": "assistant", "content": "", "tool_calls": [CALL]}
QUESTION, TWO, THREE = said("u:1+1?"), said("a:2"), said("a:3")
