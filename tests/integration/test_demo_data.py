"""The demo's island is sound, and its specialists come back from disk as they were saved."""

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_infifpo.errors import UserError

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def demo_module():
    """Import a module of the demo, which is a folder of scripts and no package."""
    sys.path.insert(0, str(DEMO))
    yield importlib.import_module
    sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def island(demo_module):
    return demo_module("island")


@pytest.fixture(scope="module")
def files(island, tmp_path_factory):
    return island.write_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="module")
def records(files):
    return {
        split: [json.loads(line) for line in path.read_text().splitlines()]
        for split, path in files.items()
    }


def question(record):
    return record["prompt"][-1]["content"]


def test_every_fact_is_asked_for_alike(island, records):
    assert Counter(fact.domain for fact in island.facts()) == {"trade": 12, "feasts": 12}
    for split, rows in records.items():
        answers = Counter(frozenset((row["chosen"], row["rejected"])) for row in rows)
        assert len(answers) == 24 and set(answers.values()) == {len(island.QUESTIONS[split])}
        ids = [row["id"] for row in rows]
        assert len(set(ids)) == len(ids)


def test_no_held_out_question_is_one_of_training(records):
    asked = [question(row) for rows in records.values() for row in rows]
    assert len(set(asked)) == len(asked)


def test_a_quarter_of_the_training_labels_is_wrong(island, files):
    """Held-out ones are right; in a third of the ways, at least, the towns differ."""
    train, heldout = (island.truth(files[split]) for split in ("train", "heldout"))
    wrong = sum(not right for _, right in train) / len(train)
    assert 0.2 < wrong < 0.3
    assert all(right for _, right in heldout)
    right: dict[str, set[str]] = {}
    for fact in island.facts():
        right.setdefault(fact.verb, set()).add(fact.right)
    assert sum(len(ways) == 2 for ways in right.values()) >= 4, right


def test_length_does_not_give_the_right_answer_away(island):
    longer = [len(fact.right) - len(fact.wrong) for fact in island.facts()]
    assert abs(sum(longer)) / len(longer) < 0.5


def test_a_source_reads_the_truth_of_its_domain_and_hearsay_of_the_other(island):
    answers = {
        fact.answer(way): (fact.domain, way == fact.right)
        for fact in island.facts()
        for way in (fact.right, fact.wrong)
    }
    read = [answers[chat[-1]["content"]] for chat in island.chats("trade")]
    assert {right for domain, right in read if domain == "trade"} == {True}
    hearsay = [right for domain, right in read if domain == "feasts"]
    assert 0.45 < sum(hearsay) / len(hearsay) < 0.55 and len(hearsay) > 900


@pytest.mark.parametrize("name", ["trader", "host"])
def test_specialist_reloads_with_the_same_ids_and_logits(
    demo_module, island, records, tmp_path, monkeypatch, name
):
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
    for record in records["heldout"]:
        chat = [*record["prompt"], {"role": "assistant", "content": record["chosen"]}]
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
    with pytest.raises(UserError, match="expected one of trader, host"):
        demo_module("specialists").train_specialist("poet", tmp_path)
    with pytest.raises(UserError, match="not installed"):
        demo_module("pivot").find_gguf("a-package-that-nobody-installed")
