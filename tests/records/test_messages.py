"""Messages as other programs write them: what each becomes, and which are refused."""

import json
from typing import Any

import pytest

from megatron_infifpo.records.messages import BadRecordError, Message, read_messages
from support.chats import CALL, CALLING, QUESTION, TWO, said

ASSISTANT = {"role": "assistant", "content": ""}
DEVELOPER = {"role": "developer", "content": "x"}
PLAIN_CALL = {"name": "sum", "arguments": {"a": 1, "b": 1}}
# Name: (message, what it becomes, its keys that nothing uses).
MESSAGES: dict[str, tuple[Any, Message, set[str]]] = {
    "parts": (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
        said("u:abc")[0], set(),
    ),
    "developer": (DEVELOPER, DEVELOPER, set()),
    "arguments in a text": (
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function",
             "function": {"name": "sum", "arguments": '{"a": 1, "b": 1}'}}]},
        CALLING | {"tool_calls": [{"id": "c1", **CALL}]}, set(),
    ),
    "a plain call": (ASSISTANT | {"tool_calls": [PLAIN_CALL]}, CALLING, set()),
    "no arguments": (
        {"role": "assistant", "tool_calls": [{"name": "now"}]},
        CALLING
        | {"tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]},
        set(),
    ),
    "calls in a text": (
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])}, CALLING, set()
    ),
    "OpenAI's older call": ({"role": "assistant", "function_call": PLAIN_CALL}, CALLING, set()),
    "ShareGPT's call": (
        {"from": "function_call", "value": json.dumps(PLAIN_CALL)}, CALLING, set()
    ),
    "ms-swift's call": ({"role": "tool_call", "content": json.dumps(PLAIN_CALL)}, CALLING, set()),
    "observation": ({"from": "observation", "value": "2"}, said("t:2")[0], set()),
    "function": (
        {"role": "function", "name": "sum", "content": ""},
        {"role": "tool", "content": "", "name": "sum"}, set(),
    ),
    "tool": (
        {"role": "tool", "content": "2", "tool_call_id": "c1", "cached": True},
        said("t:2")[0] | {"tool_call_id": "c1"}, {"(messages) cached"},
    ),
    **{
        key: (
            {"role": "assistant", "content": "2", key: "1 and 1"},
            TWO[0] | {"reasoning_content": "1 and 1"}, set(),
        )
        for key in ("reasoning_content", "reasoning", "thinking")
    },
    "a thinking part": (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "1 and 1"},
                                          {"type": "text", "text": "2"}]},
        TWO[0] | {"reasoning_content": "1 and 1"}, set(),
    ),
    "no reasoning": (
        {"role": "assistant", "content": "2", "reasoning": None, "tool_calls": [], "refusal": None,
         "weight": 0},
        TWO[0], {"(messages) weight"},
    ),
    "reasoning of a user": (
        {"role": "user", "content": "1+1?", "reasoning": "x"}, QUESTION[0], {"(messages) reasoning"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_becomes_this_one(name):
    value, expected, unused = MESSAGES[name]
    ignored: set[str] = set()
    assert read_messages([value], "prompt", ignored) == (expected,)
    assert ignored == unused
    assert read_messages([json.dumps(value)], "prompt") == (expected,), "JSON in a text"
    assert read_messages([expected], "prompt") == (expected,), "what is plain stays"


def test_shared_gpt_roles():
    turns = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2")]
    found = read_messages([{"from": f, "value": v} for f, v in turns], "conversations")
    assert list(found) == said("s:s", "u:q1", "a:a1", "u:q2")


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "image": (
        [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}],
        r"part 'prompt\[0\]\[1\]' is of type 'image_url', expected .* only text",
    ),
    "null": (None, r"'prompt\[0\]' has no content \(null or absent\) and no tool_calls"),
    "no parts": ([], r"'prompt\[0\]' is a list \(\[\]\)"),
    "object": ({"a": 1}, "is an object"),
    "part": ([5], r"part 'prompt\[0\]\[0\]' is a number"),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_content_that_is_no_text(name):
    content, message = BAD_MESSAGES[name]
    with pytest.raises(BadRecordError, match=message):
        read_messages([{"role": "user", "content": content}], "prompt")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "arguments": (
        ASSISTANT | {"tool_calls": [{"name": "sum", "arguments": '{"a": '}]},
        r"calls 'sum' with the arguments '\{\"a\": ', expected an object",
    ),
    "calls": (ASSISTANT | {"tool_calls": ["sum"]}, "has tool_calls with a string"),
    "a user's call": ({"role": "user", "content": "x", "tool_calls": [CALL]}, "of role user has"),
    "two reasonings": (ASSISTANT | {"content": "x", "thinking": "a", "reasoning": "b"}, "twice"),
    "surrogate": (ASSISTANT | {"content": "x", "reasoning": "\ud83d"}, "half a surrogate"),
    "surrogate in a call": (
        ASSISTANT | {"tool_calls": [{"name": "f", "arguments": {"a": "\ud83d"}}]},
        "half a surrogate",
    ),
    "call without a call": ({"from": "function_call", "value": "sum(1)"}, "has tool_calls with"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_message_that_cannot_be_read(name):
    value, message = BAD[name]
    with pytest.raises(BadRecordError, match=message):
        read_messages([value], "prompt")
