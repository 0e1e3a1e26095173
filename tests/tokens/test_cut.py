"""A response that was cut: its end of turn is there, and is not scored."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.tokens.encoding import encode_or_refuse
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import templates
from support.datasets import CHATML, byte_tokenizer

USER: dict[str, Any] = {"role": "user", "content": "What is 2+2?"}
FIELD = {"role": "assistant", "content": "It is 4.", "reasoning_content": "two plus two"}
RESPONSES = (
    reply("It is 4."),
    reply("It is"),
    (FIELD,),
    (*reply("Four?"), {"role": "user", "content": "Sure?"}, *reply("It is 4.")),
    reply("<think>\ntwo\n</think>\n\nIt is 4."),
)
LISTED = PreferenceRecord("x", "general", (USER,), RESPONSES, listed=True)


def marks(found):
    return found.scored or tuple(np.ones(len(ids), bool) for ids in found.response_ids)


@pytest.mark.parametrize("name", templates.NAMES)
def test_all_but_the_end_of_turn_is_scored(name):
    chat = templates.chat(name)
    whole, text = chat.encode(LISTED), chat.render(LISTED)
    for number in range(len(RESPONSES)):
        record = replace(LISTED, cut=tuple(i == number for i in range(len(RESPONSES))))
        found, shown = chat.encode(record), chat.render(record)
        assert found.prompt_ids.tolist() == whole.prompt_ids.tolist()
        for i, (ids, other) in enumerate(zip(found.response_ids, whole.response_ids, strict=True)):
            assert ids.tolist() == other.tolist(), "the template renders the same"
            spans, before = ([*t.replies[i].scored] for t in (shown, text))
            scored, all_scored = marks(found)[i], marks(whole)[i]
            if i != number:
                assert spans == before and scored.tolist() == all_scored.tolist()
                continue
            (begin, end), said = spans[-1], shown.replies[i].text
            assert spans[:-1] == before[:-1] and before[-1] == (begin, len(said))
            assert said[end:] == chat.end_of_turn and not said[:end].endswith("\n")
            assert chat.tokenizer.decode(ids[scored].tolist()) == "".join(
                said[a:b] for a, b in spans
            )
            tail = len(chat.end_of_turn_ids)
            assert scored.tolist() == [*all_scored[: len(ids) - tail].tolist(), *[False] * tail]
        note = "the end of turn of a response that was cut is not scored"
        assert (note in found.notes) == bool(chat.end_of_turn)
        assert note not in whole.notes


@pytest.mark.parametrize("name", ["phi-4", "qwen2.5", "mistral-small"])
def test_real_tokenizers(shared_data, name):
    chat = ChatTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    texts = ["Yes.", "No", "A list:\n", "a ", "if x:\n    ", "4\n\n", "漢", "</s"]
    replies = tuple(map(reply, texts))
    record = PreferenceRecord("x", "g", (USER,), replies, listed=True, cut=(True,) * len(texts))
    found = chat.encode(record)
    whole = chat.encode(replace(record, cut=()))
    for ids, all_ids, scored, text in zip(
        found.response_ids, whole.response_ids, marks(found), texts, strict=True
    ):
        assert ids.tolist() == all_ids.tolist()
        assert scored.tolist() == [True] * (len(ids) - 1) + [False]
        assert chat.tokenizer.decode(ids[scored].tolist()).strip() == text.strip()
    assert whole.scored is None


def test_a_token_across_the_border_is_not_scored(shared_data):
    """Templates without special tokens: the end of the text and the end of turn may be one."""
    template = CHATML.replace("<|im_end|>\n", "\n\n---\n").replace("<|im_start|>", "### ")
    chat = ChatTokenizer.from_pretrained(shared_data / "tokenizers" / "qwen2.5", template=template)
    assert chat.end_of_turn == "\n\n---"
    replies = reply("It is 4."), reply("It is 4")
    record = PreferenceRecord("x", "g", (USER,), replies, listed=True, cut=(True, True))
    found, decode = chat.encode(record), chat.tokenizer.decode
    pieces = [decode([i]) for i in found.response_ids[0]]
    assert pieces[-2:] == [".\n\n", "---"], "the full stop is a part of the token"
    kept = [
        decode(ids[m].tolist()) for ids, m in zip(found.response_ids, marks(found), strict=True)
    ]
    assert kept == ["It is 4", "It is 4"]
    short = replace(record, responses=(reply("Yes"), reply(".")))
    assert encode_or_refuse([short], chat) == ["no token of 'response_1' is scored"]


def test_all_turns_but_the_last_end_are_scored_if_asked():
    chat = ChatTokenizer(byte_tokenizer(), score="all")
    prompt = (USER, *reply("Add?"), {"role": "user", "content": "Yes."})
    record = PreferenceRecord("x", "g", prompt, (reply("4"), reply("5")), cut=(True, False))
    text = chat.render(record)
    spans = [[r.text[a:b] for a, b in r.scored] for r in text.replies]
    assert spans == [["Add?<|im_end|>", "4"], ["Add?<|im_end|>", "5<|im_end|>"]]


def test_a_template_without_an_end_of_turn_changes_nothing():
    chat = ChatTokenizer(byte_tokenizer("{% for m in messages %}\n{{ m['content'] }}{% endfor %}"))
    record = PreferenceRecord("x", "g", (USER,), (reply("4"), reply("5")), cut=(True, False))
    assert chat.encode(record).scored is None and not chat.encode(record).notes
