"""The demo's pairs are sound, and its specialists come back from disk as they were saved."""

import ast
import difflib
import importlib
import json
import random
import re
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_infifpo.errors import UserError

DEMO = Path(__file__).parents[2] / "examples" / "demo"
DOMAINS = {"general", "math", "code"}


def read(split):
    lines = (DEMO / "data" / f"{split}.jsonl").read_bytes().decode("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def question(record):
    prompt = record["prompt"]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def words(text):
    """Rough tokens: words, single digits and punctuation marks."""
    return len(re.findall(r"[A-Za-z]+|\S", text))


TRAIN, HELD_OUT = read("train"), read("heldout")
ALL = TRAIN + HELD_OUT


@pytest.fixture(scope="module")
def demo_module():
    """Import a module of the demo, which is a folder of scripts and no package."""
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module
    sys.path.remove(str(DEMO))


@pytest.mark.parametrize(("records", "least"), [(TRAIN, 64), (HELD_OUT, 32)])
def test_enough_pairs_in_equal_domains(records, least):
    counts = Counter(record["domain"] for record in records)
    assert len(records) >= least
    assert set(counts) == DOMAINS
    assert max(counts.values()) - min(counts.values()) <= 2


def test_ids_are_unique_and_fields_filled():
    assert len({record["id"] for record in ALL}) == len(ALL)
    for record in ALL:
        assert set(record) == {"id", "domain", "prompt", "chosen", "rejected"}
        assert question(record).strip() and record["chosen"].strip() and record["rejected"].strip()
        assert record["chosen"] != record["rejected"]
        if not isinstance(record["prompt"], str):
            assert [message["role"] for message in record["prompt"]] == ["system", "user"]


def test_no_text_occurs_twice():
    for texts in (map(question, ALL), (r["chosen"] for r in ALL), (r["rejected"] for r in ALL)):
        counts = Counter(" ".join(text.lower().split()) for text in texts)
        assert max(counts.values()) == 1, counts.most_common(1)


def test_held_out_prompts_are_no_variants_of_training_prompts():
    for record in HELD_OUT:
        for other in TRAIN:
            ratio = difflib.SequenceMatcher(None, question(record), question(other)).ratio()
            assert ratio < 0.8, (question(record), question(other))


@pytest.mark.parametrize("records", [TRAIN, HELD_OUT])
def test_length_does_not_give_the_preference_away(records):
    chosen = [words(record["chosen"]) for record in records]
    rejected = [words(record["rejected"]) for record in records]
    assert 0.85 < statistics.mean(chosen) / statistics.mean(rejected) < 1.15
    longer = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / len(records)
    assert 0.3 < longer < 0.7


def test_python_in_chosen_responses_compiles():
    blocks = [b for r in ALL for b in re.findall(r"```python\n(.*?)```", r["chosen"], re.DOTALL)]
    assert len(blocks) > 25
    for block in blocks:
        ast.parse(block)


def test_chosen_math_answers_are_not_those_of_the_rejected():
    for record in ALL:
        if record["domain"] == "math":
            answer = re.search(r"Answer: (.+)\.$", record["chosen"])
            assert answer, record["id"]
            assert not record["rejected"].endswith(answer.group(0)), record["id"]


def test_generated_problems_are_right_and_not_held_out(demo_module):
    text = demo_module("training_text")
    problems = text.math_examples(random.Random(0), 300)
    held_out = {question(record) for record in HELD_OUT}
    assert not held_out & {prompt for _, prompt, _ in problems}
    for _, _, solution in problems:
        for left, right in re.findall(r"((?:[\d.]+ [-+*/] )+\d+) = (\d+)\b(?!/)", solution):
            assert eval(left) == pytest.approx(int(right)), solution  # digits and operators only


@pytest.mark.parametrize("name", ["generalist", "coder"])
def test_specialist_reloads_with_the_same_ids_and_logits(demo_module, tmp_path, monkeypatch, name):
    specialists = demo_module("specialists")
    built = {}
    for function in ("build_model", "train_tokenizer"):
        original = getattr(specialists, function)

        def keep(*args, original=original, function=function):
            built[function] = original(*args)
            return built[function]

        monkeypatch.setattr(specialists, function, keep)
    folder = specialists.train_specialist(name, tmp_path, steps=2, batch_size=2, sequence_length=32)
    assert (folder / "model.safetensors").is_file()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == specialists.SPECIALISTS[name].vocab_size
    for record in HELD_OUT:
        chat = specialists.messages("Be brief.", question(record))
        chat.append({"role": "assistant", "content": record["chosen"]})
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        assert ids == built["train_tokenizer"].apply_chat_template(chat, return_dict=False)
        assert ids[-1] == tokenizer.eos_token_id
        assert record["chosen"] in tokenizer.decode(ids)
    ids = torch.tensor([ids])
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, built["build_model"](ids).logits)

    before = (folder / "model.safetensors").stat().st_mtime_ns
    specialists.train_specialist(name, tmp_path)  # complete: left alone
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_unknown_specialist_and_missing_package_are_user_errors(demo_module, tmp_path):
    with pytest.raises(UserError, match="expected one of generalist, coder"):
        demo_module("specialists").train_specialist("poet", tmp_path)
    with pytest.raises(UserError, match="not installed"):
        demo_module("pivot").find_gguf("a-package-that-nobody-installed")
