"""Calls of tools that come as text: known for what they are, in every template's notation."""

import re

import pytest

from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.calls import writes_call
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.responses.turns import Opened, Turns
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import templates
from support.chats import CALL, CALLING, QUESTION, SUM
from support.templates import NAMES

CALLED = ({**CALLING, "tool_calls": [{**CALL, "id": "call00001"}]},)
TOOL = {"type": "function", "function": {**SUM["function"], "description": "Add."}}
UNREAD = "a tool call as text"


def check(chat: ChatTokenizer) -> None:
    """A call is told from an answer; without tools, or without special tokens, too."""
    turns = Turns(chat)
    record = PreferenceRecord("p", "general", (*QUESTION,), (CALLED, reply("2")), tools=(TOOL,))
    called = chat.render(record).replies[0].text
    opened, without = (
        turns.open(Prompt("p", "general", (*QUESTION,), {}, tools)) for tools in ((TOOL,), ())
    )
    thinks = opened.text.rstrip().endswith("<think>")

    def response(said: str, prompt: Opened) -> Response:
        ids = chat.tokenizer(said, add_special_tokens=False)["input_ids"]
        return turns.response([*ids, chat.tokenizer.eos_token_id], prompt)

    assert response(called, opened).fault == UNREAD, chat.path
    assert response(called[:-12], opened).fault == UNREAD, "not kept as one that was cut"
    assert response(called, without).fault != UNREAD, chat.path
    found = response(("</think>\n\n" if thinks else "") + "The sum is 2.", opened)
    assert (found.fault, found.text) == (None, "The sum is 2."), chat.path
    lead = chat.template.habits({}).lead  # which a model writes itself, after the generation prompt
    assert response(f"{lead}The sum is 2.", without).text == "The sum is 2." or thinks, chat.path
    special = [t.content for t in chat.tokenizer.added_tokens_decoder.values() if t.special]
    bare = re.sub("|".join(map(re.escape, sorted(special, key=len)[::-1])), "", called)
    assert writes_call(bare, (TOOL,)), "a server drops special tokens"


def test_published_templates():
    able = [
        chat
        for chat in map(templates.chat, NAMES)
        if chat.template.writes("tools", {}) and chat.template.writes("tool_calls", {})
    ]
    assert len(able) == 44
    for chat in able:
        check(chat)


def test_a_real_tokenizer(shared_data):
    check(ChatTokenizer.from_pretrained(shared_data / "tokenizers" / "mistral-small"))


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("The sum is 2.", False),
        ("sum and product", False),
        ("I use the tool sum for 1 and 1: it gives (2).", False),
        ('{"result": "sum", "name": "two"}', False),
        ('{"name": "sum", "parameters": {"a": 1}}', True),
        ('Let me add.\n{"type": "function", "function": {"name": "sum"}}', True),
        ("[sum(a=1)]", True),
        ("<tool_call>\n{", True),
    ],
)
def test_what_is_a_call(text, call):
    assert writes_call(text, (SUM,)) == call
    assert not writes_call(text, ())
