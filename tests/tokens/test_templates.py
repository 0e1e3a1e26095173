"""Prompt and reply are what the template renders: TRL's published templates are the witnesses."""

import re
from dataclasses import replace
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.tokens.chat_template import RefusedRecordError
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import templates
from support.datasets import CHATML, byte_tokenizer
from support.templates import FOLDER, NAMES

USER: dict[str, Any] = {"role": "user", "content": "What is 2+2?"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "type": "function",
            "id": "call00001",
            "function": {"name": "add", "arguments": {"a": 2, "b": 2}},
        }
    ],
}
RESULT: dict[str, Any] = {
    "role": "tool",
    "name": "add",
    "tool_call_id": "call00001",
    "content": "4",
}
INTEGER = {"type": "integer"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add.",
        "parameters": {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}},
    },
}
THINKING = "<think>\ntwo plus two\n</think>\n\nIt is 4."
FIELD = {"role": "assistant", "content": "It is 4.", "reasoning_content": "two plus two"}
REPLIES = {
    "plain": reply("It is 4."),
    "padded": reply(" \n It is 4.\n"),
    "thinking": reply(THINKING),
    "reasoning_content": (FIELD,),
    "call": (CALL,),
    "calls and answer": (CALL, RESULT, *reply("It is 4.")),
    "turns": (*reply("Four?"), {"role": "user", "content": "Sure?"}, *reply("It is 4.")),
}
# Templates that write tools but not an assistant's calls, and those that write both.
NO_CALLS = ("lfm2", "lfm2_training")
CALLS = re.compile(
    r"(diffusion_gemma|gemma4|glm4moe|gptoss|lfm2_v2|lfm2_2_5|llama3_[12]|muse_glimmer|nemotron"
    r"|qwen2_5(?!_vl)|qwen3)"
)
# Templates that write reasoning_content, those of them that write <think> text otherwise (it is
# given to them as reasoning_content), and those that drop all reasoning.
WRITES = re.compile(
    r"(diffusion_gemma|gemma4_v5|glm4moe|gptoss|lfm2_2_5|muse_glimmer|nemotron|qwen3(?!_vl|_inst))"
)
GIVEN_AS_FIELD = re.compile(r"(diffusion_gemma|gemma4_v5|gptoss|lfm2_2_5|muse_glimmer|qwen3_8)")
DROPS = ("deepseek_r1_distill", "deepseekv3", "deepseekv3_training")
TAILS = ("", " ", "\n", "\n</s>", "<|END_OF_TURN_TOKEN|>")  # what nothing predicts: after the turn


@pytest.fixture(scope="module")
def chats():
    return {name: templates.chat(name) for name in NAMES}


def record(chosen, tools=()):
    return PreferenceRecord("x", "general", (USER,), (chosen, reply("It is 5.")), tools=tools)


def render(chat, messages, tools=()):
    """What the template renders, asked of transformers."""
    if chat.template.habits({}).as_parts:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return chat.tokenizer.apply_chat_template(messages, tools=list(tools) or None, tokenize=False)


@pytest.mark.parametrize("kind", REPLIES)
@pytest.mark.parametrize("name", NAMES)
def test_prompt_and_reply_are_what_the_template_renders(chats, name, kind):
    chat, tools = chats[name], (ADD,) if "call" in kind else ()
    if tools and not CALLS.match(name):
        reason = "does not write tool" + ("_calls" if name in NO_CALLS else "s")
        with pytest.raises(RefusedRecordError, match=reason):
            chat.encode(record(REPLIES[kind], tools))
        return
    source = record(REPLIES[kind], tools)
    text, ids = chat.render(source), chat.encode(source)
    scored = ids.scored or [[True] * len(r) for r in ids.response_ids]
    for number, messages in enumerate(source.responses):
        if kind == "thinking" and number == 0 and GIVEN_AS_FIELD.match(name):
            messages = (FIELD,)
        found, whole = text.replies[number], render(chat, [USER, *messages], tools)
        shown = text.prompt + found.text
        assert whole.startswith(shown) and whole.removeprefix(shown) in TAILS
        joined = [*ids.prompt_ids.tolist(), *ids.response_ids[number].tolist()]
        assert joined == chat.tokenizer(shown, add_special_tokens=False)["input_ids"]
        kept = ids.response_ids[number][list(scored[number])].tolist()
        spans = "".join(found.text[a:b] for a, b in found.scored)
        assert chat.tokenizer.decode(kept) == spans
        check_scored(name, kind if number == 0 else "plain", spans, chat.end_of_turn)


def check_scored(name, kind, spans, end):
    """The answer is scored with its end of turn; what is not the reply's own is not."""
    assert end or name == "glm4moe"
    if kind != "call":
        answer = {"plain": "It is 4."}.get(kind, "It is 4.")
        assert spans.rstrip().endswith(end) and ("It is 5." in spans or answer in spans)
    assert ("two plus two" in spans) == (
        kind in ("thinking", "reasoning_content") and bool(WRITES.match(name))
        or (kind == "thinking" and name == "deepseek_r1_distill_training")
    )  # fmt: skip
    assert ("Sure?" in spans, "Four?" in spans) == (False, False)
    if kind in ("plain", "padded", "turns"):
        assert not re.search("think|thought|channel|analysis", spans)
    if kind == "calls and answer":
        assert "add" in spans and spans.count("4") == 1, "a tool's result is not scored"


def test_notes_say_what_became_of_reasoning(chats):
    for name in NAMES:
        for kind in ("thinking", "reasoning_content"):
            notes = " ".join(chats[name].encode(record(REPLIES[kind])).notes)
            literal = kind == "thinking" and name not in DROPS
            if WRITES.match(name) or (literal and name == "deepseek_r1_distill_training"):
                assert "reasoning" not in notes
            elif literal:
                assert "the reasoning of a reply is not scored" in notes
            else:
                assert "the template leaves out the reasoning of a reply" in notes


def test_reasoning_is_scored_if_asked(chats):
    hf = chats["qwen3"].tokenizer
    source = record(REPLIES["thinking"])
    texts = {}
    for choice in ("yes", "no"):
        for name in ("qwen3", "llama3_1"):
            hf = chats[name].tokenizer
            chat = ChatTokenizer(hf, name, reasoning=choice)
            found = chat.encode(source)
            marks = found.scored or [[True] * len(r) for r in found.response_ids]
            texts[choice, name] = hf.decode(found.response_ids[0][list(marks[0])].tolist())
    assert texts["yes", "qwen3"] == THINKING + "<|im_end|>"
    assert texts["yes", "llama3_1"] == THINKING + "<|eot_id|>"
    assert texts["no", "qwen3"] == "It is 4.<|im_end|>"
    assert texts["no", "llama3_1"] == "It is 4.<|eot_id|>"
    with pytest.raises(UserError, match="reasoning is 'perhaps', expected one of auto, yes, no"):
        ChatTokenizer(hf, reasoning="perhaps")


def test_all_turns_are_scored_if_asked(chats):
    earlier: tuple[dict[str, Any], ...] = (
        {"role": "assistant", "content": "Add?"},
        {"role": "user", "content": "Yes."},
    )
    for name in ("qwen3", "llama3_1", "gptoss", "glm4moe", "gemma3", "deepseek_r1_distill"):
        chat = ChatTokenizer(chats[name].tokenizer, name, score="all")
        source = PreferenceRecord(
            "x", "general", (USER, *earlier), (REPLIES["turns"], reply("It is 5."))
        )
        text = chat.render(source)
        end = "<|end|>" if name == "gptoss" else chat.end_of_turn
        both = (["Add?", "Four?", "It is 4."], ["Add?", "It is 5."])
        for found, said in zip(text.replies, both, strict=True):
            spans = [found.text[a:b] for a, b in found.scored]
            wanted = [*(s + end for s in said[:-1]), said[-1] + chat.end_of_turn]
            assert spans == wanted
        assert text.prompt.count("2+2") == 1 and "Add?" not in text.prompt


def test_options_of_the_data_set_and_of_a_record(chats):
    hf = chats["qwen3"].tokenizer
    plain = record(REPLIES["plain"])
    off = ChatTokenizer(hf, options={"enable_thinking": False})
    assert off.render_prompt((USER,)).endswith("assistant\n<think>\n\n</think>\n\n")
    assert off.describe()["chat_template_options"] == {"enable_thinking": False}
    thinking = off.render(record(REPLIES["thinking"]))
    assert thinking.prompt.endswith("<|im_start|>assistant\n")
    assert thinking.replies[0].text == THINKING + "<|im_end|>"
    own = replace(plain, id="x", template_options={"add_thoughts": 1})
    assert "reads no variable 'add_thoughts'" in " ".join(off.encode(own).notes)
    with pytest.raises(UserError, match="reads no variable 'enable_thoughts'"):
        ChatTokenizer(hf, options={"enable_thoughts": False})
    with pytest.raises(UserError, match="reads no variable 'tools'"):
        ChatTokenizer(hf, options={"tools": []})
    dated = chats["llama3_1"].tokenizer
    given = replace(plain, id="x", template_options={"date_string": "1 May 2031"})
    assert "1 May 2031" in ChatTokenizer(dated).render(given).prompt


SHORT = ["<", ">", "/", "n", "think", "a", "message", "final", "end", "A", "4", "because", "im"]


@pytest.mark.parametrize("choice", ["auto", "no"])
@pytest.mark.parametrize(
    "name", ["qwen2_5", "llama3_1", "gemma3", "cohere2", "qwen3", "gptoss", "qwen3_8", "glm4moe"]
)
def test_short_answers_are_placed_as_long_ones(chats, name, choice):
    """Scored is the same whatever the answer, also where its text stands in the marks before it."""
    chat = ChatTokenizer(chats[name].tokenizer, name, reasoning=choice)

    def scored(form, answer):
        messages = form(answer)
        found = chat.render(PreferenceRecord("x", "g", (USER,), (messages, reply("other"))))
        return [found.replies[0].text[a:b] for a, b in found.replies[0].scored]

    forms = [
        lambda a: reply(f"<think>\nbecause 4 and n\n</think>\n\n{a}"),
        lambda a: reply(f"<think>\n\n</think>\n\n{a}"),
        lambda a: reply(f"because 4\nand n\n</think>\n\n{a}"),
        lambda a: reply(a),
        lambda a: ({"role": "assistant", "content": a, "reasoning_content": "because 4"},),
        lambda a: ({"role": "assistant", "content": a, "reasoning_content": "n"},),
    ]
    for number, form in enumerate(forms):
        wanted = scored(form, "UNIQUE!")
        if choice == "no":
            assert wanted == ["UNIQUE!" + chat.end_of_turn], (number, wanted)
        for answer in SHORT:
            expected = [part.replace("UNIQUE!", answer) for part in wanted]
            assert scored(form, answer) == expected, (number, answer)


def calls(*arguments):
    several = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "add", "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    return {"role": "assistant", "content": "", "tool_calls": several}


def test_calls_and_contents_that_a_template_drops_are_refused(chats):
    two = (calls({"a": 1}, {"a": 222}), RESULT, *reply("It is 4."))
    with pytest.raises(RefusedRecordError, match="writes one call of a message"):
        chats["gptoss"].encode(record(two, (ADD,)))
    assert "222" in chats["qwen3"].render(record(two, (ADD,))).replies[0].text
    # Llama 3.1 writes no content beside calls: the same words elsewhere do not stand for it.
    said = ({**CALL, "content": "I will add."}, RESULT, *reply("It is 4."))
    system: dict[str, Any] = {"role": "system", "content": "Say: I will add."}
    source = PreferenceRecord("x", "g", (system, USER), (said, reply("5.")), tools=(ADD,))
    with pytest.raises(RefusedRecordError, match="role assistant as it is"):
        chats["llama3_1"].encode(source)


def test_a_trace_whose_earlier_reasoning_is_dropped(chats):
    said = ({**CALL, "reasoning_content": "I add."}, RESULT, *reply("It is 4."))
    found = chats["gptoss"].render(record(said, (ADD,))).replies[0]
    spans = [found.text[a:b] for a, b in found.scored]
    assert len(spans) == 2 and spans[0].endswith('{"a": 2, "b": 2}<|call|>')
    assert spans[1].endswith("It is 4.<|return|>") and '"4"' not in "".join(spans)


@pytest.mark.parametrize("result", ["2", "40", "add", "4"])
def test_a_result_may_repeat_its_call(chats, result):
    said = (calls({"a": 2, "b": 40}), {**RESULT, "content": result}, *reply("It is 42."))
    for name in ("qwen3", "qwen2_5", "gemma4", "nemotron_3_nano"):
        found = chats[name].render(record(said, (ADD,))).replies[0]
        spans = [found.text[a:b] for a, b in found.scored]
        assert len(spans) == 2 and spans[1] == "It is 42." + chats[name].end_of_turn
        assert "40" in spans[0] and found.text.count(result) > spans[0].count(result)


def test_nothing_stands_for_an_end_of_turn_that_is_not_there(chats):
    chat = ChatTokenizer(chats["glm4moe"].tokenizer, score="all")
    for first in ("A1", "<think>so</think>A1"):
        said = (*reply(first), {"role": "user", "content": "And?"}, *reply("A2"))
        found = chat.render(PreferenceRecord("x", "g", (USER,), (said, reply("B")))).replies[0]
        spans = [found.text[a:b] for a, b in found.scored]
        assert [s.split("</think>")[-1].strip() for s in spans] == ["A1", "A2"]


def test_marks_of_reasoning_stay_tokens_beside_text_that_spells_tokens():
    hf = byte_tokenizer((FOLDER / "qwen3.jinja").read_text(encoding="utf-8"))
    hf.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|im_end|>"]})
    chat = ChatTokenizer(hf)
    spelled = reply("<think>\nso\n</think>\n\nA turn ends with <|im_end|>.")
    found = chat.encode(record(spelled)).response_ids[0].tolist()
    marks = hf.convert_tokens_to_ids(["<think>", "</think>", "<|im_end|>"])
    assert [i for i in found if i in marks] == marks
    assert hf.decode(found) == spelled[0]["content"] + "<|im_end|>"


def test_a_system_message_is_joined_to_the_users():
    template = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    system, hello = {"role": "system", "content": "Rhyme."}, {"role": "assistant", "content": "Hi"}
    prompt = ChatTokenizer(byte_tokenizer(template)).render_prompt((system, hello, USER))
    assert "assistant\nHi<|im_end|>" in prompt and "user\nRhyme.\n\nWhat is" in prompt


def test_options_of_a_record_that_its_template_cannot_take(chats):
    plain = record(REPLIES["plain"])
    wrong = replace(plain, id="r7", template_options={"date_string": 5})
    with pytest.raises(RefusedRecordError, match="'r7' .*its options"):
        chats["llama3_1"].encode(wrong)
    refused: list[dict[str, Any]] = [{"role": "x"}, {"content": "x"}, {"messages": []}]
    for options in (*refused, {"chat_template": "x"}):
        with pytest.raises(UserError, match="reads no variable"):
            ChatTokenizer(chats["qwen3"].tokenizer, options=options)


def test_dates_are_written_whatever_the_form():
    for call in ("strftime_now('%Y')", "strftime_now( format = '%Y' )"):
        hf = byte_tokenizer(f"{{{{ {call} }}}}" + CHATML)
        assert ChatTokenizer(hf).render_prompt((USER,)).startswith("2025<|im_start|>")
    hf = byte_tokenizer("{% set form = '%Y' %}{{ strftime_now(form) }}" + CHATML)
    with pytest.raises(UserError, match="prompts would change by night"):
        ChatTokenizer(hf)


BAD = {
    "does not write a message of role assistant as it is": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content | replace('+', 'plus') if m.role != "
        "'user' else m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
    "does not write a message of role system as it is": (
        "{% for m in messages %}[{{ m.role }}]{{ m.content[:20] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ),
}


@pytest.mark.parametrize("reason", BAD)
def test_templates_that_rewrite_are_refused(reason):
    chat = ChatTokenizer(byte_tokenizer(BAD[reason]))
    system = {"role": "system", "content": "Answer in at most twenty words."}
    source = PreferenceRecord("r1", "general", (system, USER), (reply("2+2 is 4."), reply("5.")))
    with pytest.raises(RefusedRecordError, match=f"record 'r1' .*{reason}") as refused:
        chat.encode(source)
    assert "r1" not in refused.value.reason


def test_a_template_that_marks_conversations_from_the_start_is_refused():
    template = "{% if not add_generation_prompt %}[whole]{% endif %}" + BAD.popitem()[1]
    with pytest.raises(UserError, match="otherwise than its prompt from the start"):
        ChatTokenizer(byte_tokenizer(template))


def test_an_end_of_turn_that_is_text_is_scored_as_it_stands():
    # As ChatML in a vocabulary that has no such token: its end of text is not what ends a turn.
    template = (
        "{% for m in messages %}<im_start>{{ m.role }}\n{{ m.content }}<im_end>\n{% endfor %}"
        "{% if add_generation_prompt %}<im_start>assistant\n{% endif %}"
    )
    chat = ChatTokenizer(byte_tokenizer(template))
    found = chat.encode(record(reply("It is 4.")))
    assert chat.end_of_turn == "<im_end>"
    assert chat.tokenizer.decode(found.response_ids[0].tolist()) == "It is 4.<im_end>"
