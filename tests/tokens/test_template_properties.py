"""Random conversations: what is tokenized is what transformers renders, whatever they say."""

from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import templates
from support.datasets import byte_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
SPECIALS = ("<|im_end|>", "<|im_start|>assistant\n", "</s>", "<|eot_id|>")
words = st.sampled_from(["two", "is 4", "\n", "\n\n", " ", "é\u0301", "漢", "{{x}}", *SPECIALS])
texts = st.lists(words, min_size=1, max_size=5).map(" ".join).filter(str.strip)
thoughts = st.none() | st.lists(st.sampled_from(["so", "two", "is 4"]), min_size=1).map("\n".join)


def assistant(text, thought, as_text):
    if thought is None:
        return {"role": "assistant", "content": text}
    if as_text:
        block = f"<think>\n{thought}\n</think>\n\n"
        return {"role": "assistant", "content": block + text.lstrip()}
    return {"role": "assistant", "content": text, "reasoning_content": thought}


answers = st.builds(assistant, texts, thoughts, st.booleans())
users = texts.map(lambda text: {"role": "user", "content": text})
replies = st.lists(st.tuples(answers, users), max_size=1).flatmap(
    lambda turns: answers.map(lambda last: (*(m for turn in turns for m in turn), last))
)
prompts = st.lists(st.tuples(users, answers), max_size=1).flatmap(
    lambda turns: users.map(lambda last: (*(m for turn in turns for m in turn), last))
)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3_1", "deepseek_r1_distill", "gemma3"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(prompt=prompts, chosen=replies, rejected=replies)
def test_prompt_and_reply_decode_to_the_rendering(name, prompt, chosen, rejected):
    chat = known(name)
    source = PreferenceRecord("x", "general", prompt, (chosen, rejected))
    found, hf = chat.encode(source), chat.tokenizer
    for number, messages in enumerate(source.responses):
        whole = hf.apply_chat_template([*prompt, *messages], tokenize=False)
        ids = found.response_ids[number].tolist()
        shown = hf.decode([*found.prompt_ids.tolist(), *ids])
        assert whole.startswith(shown) and not whole.removeprefix(shown).strip()
        if found.scored is not None:
            ids = found.response_ids[number][found.scored[number]].tolist()
        # The last answer is scored whole, with the end of turn, and once.
        spans, answer = hf.decode(ids), messages[-1]["content"].split("</think>")[-1].strip()
        assert spans.endswith(chat.end_of_turn) and answer in spans
        if len(messages) == 1:
            control = [i for i in ids if i in hf.all_special_ids]
            assert control == chat.end_of_turn_ids, "what looks like a special token is text"


CHATS: dict[str, ChatTokenizer] = {}


def known(name):
    if name not in CHATS:
        hf = byte_tokenizer((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
        more = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>"]
        more += ["<start_of_turn>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"]
        hf.add_special_tokens({"additional_special_tokens": [*more, "<|im_start|>", "<|im_end|>"]})
        CHATS[name] = ChatTokenizer(hf, name)
    return CHATS[name]


PARAMETERS = {"type": "object", "properties": {"to": {"type": "string"}}}
TOOL = {"name": "route", "description": "Go.", "parameters": PARAMETERS}
TOOLS = ({"type": "function", "function": TOOL},)


def call(text, number, thought):
    arguments = {"to": text, "by": [number, None, True]}
    one = {"type": "function", "id": "call00001", "function": {"name": "route"}}
    one["function"] |= {"arguments": arguments}  # type: ignore[operator]
    found = {"role": "assistant", "content": "", "tool_calls": [one]}
    return found | ({"reasoning_content": thought} if thought else {})


def result(text):
    return {"role": "tool", "name": "route", "tool_call_id": "call00001", "content": f"HERE {text}"}


# Reasoning that stands in a call or a result, too, cannot be told from it, and is refused.
apart = st.none() | st.sampled_from(["HENCE", "HENCE\nTHUS"])
asks = texts.map(lambda text: {"role": "user", "content": f"ASK {text}"})
said = st.builds(assistant, texts, apart, st.just(False)).map(lambda m: (m,))
steps = st.tuples(st.builds(call, texts, st.integers(0, 99), apart), texts.map(result))
traces = st.builds(tuple.__add__, steps, said) | said
turns = st.builds(lambda ask, trace: (ask, *trace), asks, traces)
asked = st.builds(
    lambda before, ask, step: (*before, ask, *step), turns | st.just(()), asks, steps | st.just(())
)
VARIABLES: dict[str, Any] = {
    "qwen3": st.fixed_dictionaries({"enable_thinking": st.booleans()}),
    "llama3_1": st.just({"date_string": "1 May 2031"}),
    "nemotron_3_nano": st.fixed_dictionaries({"enable_thinking": st.booleans()}),
}


@pytest.mark.parametrize("score", ["last", "all"])
@pytest.mark.parametrize("name", ["qwen2_5", "gemma4_v2", "lfm2_v2", *VARIABLES])
def test_tools_and_options(name, score):
    """Scored are answers and calls, of the last turn or of all; no result, no question."""
    chat = ChatTokenizer(templates.chat(name).tokenizer, name, score=score)

    @settings(  # a failure is shown as it was found: making it small takes minutes
        max_examples=15, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
    )
    @given(asked, traces, steps.map(lambda s: s[:1]) | said, VARIABLES.get(name, st.just({})))
    def check(prompt, chosen, rejected, options):
        source = PreferenceRecord(
            "x", "general", prompt, (chosen, rejected), tools=TOOLS, template_options=options
        )
        found = chat.encode(source)
        for number, messages in enumerate(source.responses):
            whole = chat.tokenizer.apply_chat_template(
                [*prompt, *messages], tools=list(TOOLS), tokenize=False, **options
            )
            ids = found.response_ids[number]
            shown = chat.tokenizer.decode([*found.prompt_ids.tolist(), *ids.tolist()])
            assert whole.startswith(shown) and not whole.removeprefix(shown).strip()
            kept = ids if found.scored is None else ids[found.scored[number]]
            spans = chat.tokenizer.decode(kept.tolist())
            assert "HERE" not in spans and "ASK" not in spans
            own = [
                m for m in (*(prompt if score == "all" else ()), *messages) if "ass" in m["role"]
            ]
            assert all(m["content"].strip() in spans for m in own)
            assert spans.count("route") == sum("tool_calls" in m for m in own)

    check()
