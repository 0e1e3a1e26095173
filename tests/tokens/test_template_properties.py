"""Random conversations: what is tokenized is what transformers renders, whatever they say."""

from pathlib import Path

import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.tokens.tokenization import ChatTokenizer
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
