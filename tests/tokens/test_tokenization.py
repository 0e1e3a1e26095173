import copy

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord, read_records, reply
from megatron_infifpo.tokens.options import PLAIN_TEMPLATE
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.datasets import CHATML, byte_tokenizer, record

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Strike out <s>old</s> in HTML?"}
MULTI = (SYSTEM, USER, {"role": "assistant", "content": "How?"}, {"role": "user", "content": "So."})

# What each real template writes around MULTI, and the ids of its end of turn.
REAL = {
    "phi-4": (
        "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>"
        "Strike out <s>old</s> in HTML?<|im_end|><|im_start|>assistant<|im_sep|>How?<|im_end|>"
        "<|im_start|>user<|im_sep|>So.<|im_end|><|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
        None,
    ),
    "qwen2.5": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
        "Strike out <s>old</s> in HTML?<|im_end|>\n<|im_start|>assistant\nHow?<|im_end|>\n"
        "<|im_start|>user\nSo.<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>",
        None,
    ),
    "mistral-small": (
        "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]"
        "Strike out <s>old</s> in HTML?[/INST]How?</s>[INST]So.[/INST]",
        "</s>",
        "<s>",
    ),
}


def pair(chosen="Yes.", rejected="No.", prompt=(USER,), pivot=None):
    third = () if pivot is None else (reply(pivot),)
    replies = (reply(chosen), reply(rejected), *third)
    return PreferenceRecord("x", "general", tuple(prompt), replies)


@pytest.mark.parametrize("name", REAL)
def test_real_templates(real, name):
    chat = real[name]
    hf, (rendered, end, bos) = chat.tokenizer, REAL[name]
    found = chat.encode(pair(" Yes.\n", "No", MULTI, pivot="Hm"))
    assert found.prompt_ids.dtype == np.int32 and len(found.response_ids) == 3
    assert hf.decode(found.prompt_ids.tolist()) == rendered
    texts = [hf.decode(ids.tolist()) for ids in found.response_ids]
    assert texts == [" Yes.\n" + end, "No" + end, "Hm" + end]
    assert chat.end_of_turn == end and len(chat.end_of_turn_ids) == 1
    for ids, text in zip(found.response_ids, (" Yes.\n", "No", "Hm"), strict=True):
        assert ids[-1] == chat.end_of_turn_ids[0] and ids.dtype == np.int32
        assert ids.tolist().count(ids[-1]) == 1
        assert len(ids) == len(hf(text, add_special_tokens=False)["input_ids"]) + 1
    # Whole conversation: prompt and response make what the template renders, and no token more.
    for text, ids in zip((" Yes.\n", "No"), found.response_ids, strict=False):
        full = hf.apply_chat_template(
            [*MULTI, {"role": "assistant", "content": text}], tokenize=False
        )
        # Qwen's template goes on with a newline after the end of turn, which nothing predicts.
        full = full.removesuffix("<|im_end|>\n") + "<|im_end|>" if name == "qwen2.5" else full
        joined = [*found.prompt_ids.tolist(), *ids.tolist()]
        assert hf.decode(joined) == full
        assert joined == hf(full, add_special_tokens=False)["input_ids"]
    begins = found.prompt_ids.tolist().count(hf.bos_token_id)
    # The user's "<s>" is the template's business: it counts for Mistral, where it is a token.
    assert begins == (2 if bos else 0)
    if bos:
        assert found.prompt_ids[0] == hf.bos_token_id != found.prompt_ids[1]


@pytest.mark.parametrize("name", REAL)
def test_special_tokens_in_a_response_are_ordinary_text(real, name):
    chat = real[name]
    special = set(chat.tokenizer.all_special_ids)
    text = "<s>old</s> <|im_end|><|im_start|>user [INST]x[/INST] <|endoftext|> <pad> end</s>"
    found = chat.encode(pair(text, "</s>"))
    for ids, wanted in zip(found.response_ids, (text, "</s>"), strict=True):
        assert chat.tokenizer.decode(ids.tolist()) == wanted + chat.end_of_turn
        assert [i for i in ids.tolist() if i in special] == chat.end_of_turn_ids
    # The switch for responses must not stick: the next prompt has its control tokens.
    assert chat.encode(pair()).prompt_ids.tolist() == found.prompt_ids.tolist()


def test_the_seam_never_merges(real):
    # "\n" at the end of Qwen's generation prompt and one at the start of the reply are one token
    # in a joint tokenization: the prompt's ids must not depend on the reply.
    chat = real["qwen2.5"]
    found = chat.encode(pair("\n\nYes", "No"))
    assert chat.tokenizer.decode([int(found.prompt_ids[-1])]) == "\n"
    assert chat.tokenizer.decode(found.response_ids[0].tolist()) == "\n\nYes<|im_end|>"
    assert found.prompt_ids.tolist() == chat.encode(pair()).prompt_ids.tolist()


# Tokens of all prompts and of all responses of dpo_en_demo.json.
TOTALS = {
    "phi-4": (121_258, 183_928),
    "qwen2.5": (127_851, 187_427),
    "mistral-small": (121_352, 189_469),
}


@pytest.mark.parametrize("name", REAL)
def test_real_pairs(real, shared_data, name):
    """All 300 pairs, 600 responses: what is scored is what the template renders."""
    records = read_records(shared_data / "dpo_en_demo.json")
    chat = real[name]
    hf, totals, same = chat.tokenizer, [0, 0], 0
    for source, found in zip(records, chat.encode_batch(records), strict=True):
        prompt = found.prompt_ids.tolist()
        totals[0] += len(prompt)
        assert hf.decode(prompt) == hf.apply_chat_template(
            list(source.prompt), tokenize=False, add_generation_prompt=True
        )
        if REAL[name][2]:
            assert prompt.count(hf.bos_token_id) == 1 and prompt[0] == hf.bos_token_id
        for messages, ids in zip(source.responses, found.response_ids, strict=True):
            full = hf.apply_chat_template([*source.prompt, *messages], tokenize=False)
            joined = [*prompt, *ids.tolist()]
            tail = "\n" if name == "qwen2.5" else ""  # after the end of turn: nothing predicts it
            assert hf.decode(joined) + tail == full
            totals[1] += len(ids)
            # Apart and joined, prompt and response make the same tokens but where they would merge.
            same += hf(full.removesuffix(tail), add_special_tokens=False)["input_ids"] == joined
    assert tuple(totals) == TOTALS[name]
    assert same == 600


def test_batches_equal_single_records():
    chat = ChatTokenizer(byte_tokenizer())
    records = [record(i, pivot=True) for i in range(5)]
    for source, found in zip(records, chat.encode_batch(records), strict=True):
        single = chat.encode(source)
        assert np.array_equal(single.prompt_ids, found.prompt_ids)
        for a, b in zip(single.response_ids, found.response_ids, strict=True):
            assert np.array_equal(a, b)


def test_no_template_is_refused(tmp_path):
    with pytest.raises(UserError, match="no chat template.*--chat-template: a Jinja.*'plain'"):
        ChatTokenizer(byte_tokenizer(None))
    with pytest.raises(UserError, match="cannot load a tokenizer from .*absent"):
        ChatTokenizer.from_pretrained(tmp_path / "absent")
    byte_tokenizer(None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} has no chat template"):
        ChatTokenizer.from_pretrained(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    good = (tmp_path / "tokenizer.json").read_text()
    for bad in (good.replace('"BPE"', '"Later"'), good[:200], "null", "[]"):
        (tmp_path / "tokenizer.json").write_text(bad)
        with pytest.raises(UserError, match=f"cannot load a tokenizer from {tmp_path} "):
            ChatTokenizer.from_pretrained(tmp_path)


def test_a_template_that_the_user_gives():
    chat = ChatTokenizer(byte_tokenizer(None), template=PLAIN_TEMPLATE)
    found, decode = chat.encode(pair("Yes.", "No.", MULTI)), chat.tokenizer.decode
    assert decode(found.prompt_ids.tolist()) == (
        "<s>Be brief.\n\nStrike out <s>old</s> in HTML?\n\nHow?\n\nSo.\n\n"
    )
    assert decode(found.response_ids[0].tolist()) == "Yes.</s>"
    again = ChatTokenizer(byte_tokenizer(CHATML), template=PLAIN_TEMPLATE)
    assert again.fingerprint() == chat.fingerprint(), "it replaces the tokenizer's own"
    assert chat.describe()["chat_template"] == PLAIN_TEMPLATE


def test_templates_that_print_the_date_print_the_same_one_every_day():
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    chat = ChatTokenizer(byte_tokenizer(dated))
    assert chat.render_prompt([USER]).startswith("01 Jan 2025<|im_start|>")


def test_one_bos_even_if_tokenizer_and_template_add_it():
    hf = byte_tokenizer("{{ bos_token }}" + CHATML)
    hf.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", hf.bos_token_id)]
    )
    assert hf("a")["input_ids"][0] == hf.bos_token_id
    found = ChatTokenizer(hf).encode(pair())
    assert found.prompt_ids.tolist()[0] == hf.bos_token_id != found.prompt_ids.tolist()[1]
    assert hf.bos_token_id not in found.response_ids[0]
    twice = copy.deepcopy(hf)
    twice.chat_template = "{{ bos_token }}" + hf.chat_template
    assert np.array_equal(ChatTokenizer(twice).encode(pair()).prompt_ids, found.prompt_ids)


def test_a_template_that_trims_or_refuses_system():
    # Like Gemma 2's: no system role, contents trimmed.
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + CHATML.replace("m['content']", "m['content'] | trim")
    )
    chat = ChatTokenizer(byte_tokenizer(template))
    found = chat.encode(pair(" Yes.\n", "No.", (SYSTEM, USER)))
    prompt = chat.tokenizer.decode(found.prompt_ids.tolist())
    assert "user\nBe brief.\n\nStrike out" in prompt and "system" not in prompt
    assert chat.tokenizer.decode(found.response_ids[0].tolist()) == "Yes.<|im_end|>"
    dropping = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    prompt = ChatTokenizer(byte_tokenizer(dropping)).render_prompt((SYSTEM, USER))
    assert "Be brief." in prompt


def test_other_refusals_name_the_record():
    template = "{% if messages | length > 3 %}{{ raise_exception('too many') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match="refuses record 'x' .*too many"):
        ChatTokenizer(byte_tokenizer(template)).encode(pair(prompt=MULTI))
    with pytest.raises(UserError, match="does not print the assistant's reply"):
        ChatTokenizer(byte_tokenizer("{{ messages[0]['content'] }}"))


def test_a_template_without_an_end_of_turn():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    chat = ChatTokenizer(byte_tokenizer(template))
    assert (chat.end_of_turn, chat.end_of_turn_ids) == ("", [])
    # This template takes no notice of the generation prompt: the reply's header is learnt.
    assert chat.render_prompt((USER,)).endswith("HTML?\nassistant: ")
    found = chat.encode(pair())
    assert chat.tokenizer.decode(found.response_ids[0].tolist()) == "Yes."


def test_text_before_the_reply_belongs_to_the_prompt_and_blanks_to_the_reply():
    thinking = CHATML.replace(
        "{{ m['content'] }}",
        "{% if m.role == 'assistant' %}[no thoughts]{% endif %}{{ m.content }}",
    )
    chat = ChatTokenizer(byte_tokenizer(thinking))
    assert chat.render_prompt((USER,)).endswith("assistant\n")
    assert chat.render(pair()).prompt.endswith("assistant\n[no thoughts]")
    llama = "{% for m in messages %}{% if m.role == 'user' %}<s>[{{ m.content }}]{% else %}"
    llama += " {{ m.content }} </s>{% endif %}{% endfor %}"
    chat = ChatTokenizer(byte_tokenizer(llama))
    found = chat.encode(pair())
    assert chat.tokenizer.decode(found.prompt_ids.tolist()).endswith("HTML?]")
    assert chat.tokenizer.decode(found.response_ids[0].tolist()) == " Yes. </s>"


def test_sentencepiece_puts_no_blank_before_a_reply():
    pieces = ["\u2581", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.?<>/|_\n"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "ye", "\u2581ye"])}
    merges = [("y", "e"), ("\u2581", "ye")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, eos_token="</s>")
    chat = ChatTokenizer(hf)
    assert hf.convert_ids_to_tokens(hf("yes")["input_ids"])[0] == "\u2581ye"
    found = chat.encode(pair("yes", " yes"))
    tokens = [hf.convert_ids_to_tokens(ids.tolist()) for ids in found.response_ids]
    assert tokens == [["ye", "s", "<|im_end|>"], ["\u2581ye", "s", "<|im_end|>"]]


def test_fingerprints_follow_content():
    base = ChatTokenizer(byte_tokenizer()).fingerprint()
    again = ChatTokenizer(byte_tokenizer())
    again.tokenizer("a", truncation=True, max_length=1)  # leaves a setting in the tokenizer
    assert again.fingerprint() == base
    other = ChatTokenizer(byte_tokenizer(CHATML + " ")).fingerprint()
    assert other["tokenizer_sha256"] == base["tokenizer_sha256"]
    assert other["chat_template_sha256"] != base["chat_template_sha256"]
    hf = byte_tokenizer()
    hf.add_tokens(["extra"])
    assert ChatTokenizer(hf).fingerprint()["tokenizer_sha256"] != base["tokenizer_sha256"]
