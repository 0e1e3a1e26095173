"""Questions, answers and judges of the study's world."""

from collections import Counter

import numpy as np
import pytest

from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.study import models, world
from megatron_infifpo.study.world import DOMAINS, PARTS, VILLAGES, Question, draw, form


def test_answers():
    """Carry the ten or drop it; turn to the left or to the right; one ending or the other."""
    for question in draw("heldout", 300, "test"):
        village, *rest = question.text.split()
        if question.domain == "sums":
            a, b = map(int, rest[0].split("+"))
            assert question.forms == (str(a + b), str(a // 10 * 10 + b // 10 * 10 + (a + b) % 10))
        elif question.domain == "turns":
            x, y, z = rest[1].split("-")
            assert question.forms == (f"{y}-{z}-{x}", f"{z}-{x}-{y}")
        else:
            assert question.forms == (rest[1] + "ek", rest[1] + "um")
        assert village in VILLAGES[question.domain]
        assert {question.right, question.other} == set(question.forms)
        assert question.right == question.forms[form(question.domain, village)]
        assert len(set(map(len, question.forms))) == 1  # length tells nothing


def test_cells():
    villages = [village for names in VILLAGES.values() for village in names]
    assert len(villages) == len(set(villages)) == 90
    forms = Counter(form(domain, village) for domain in DOMAINS for village in VILLAGES[domain])
    assert min(forms.values()) > 30


def test_parts_share_no_question():
    """A question is of one part, whoever draws it."""
    drawn = {part: {q.text for q in draw(part, 400, seed)} for part in PARTS for seed in (1,)}
    for part, texts in drawn.items():
        assert len(texts) == 400
        others = set().union(*(found for name, found in drawn.items() if name != part))
        assert not texts & others
    assert [q.text for q in draw("sft", 9, 1)] == [q.text for q in draw("sft", 9, 1)]
    assert [q.text for q in draw("sft", 9, 1)] != [q.text for q in draw("sft", 9, 2)]
    ids = {q.id for q in draw("sft", 400, 1)}
    assert len(ids) == 400


def prompt_of(question: Question) -> Prompt:
    record = question.record()
    return Prompt(record["id"], record["domain"], (), record["extra"])


@pytest.mark.parametrize(("judge", "rate"), [("exact", 0), ("noise10", 0.1), ("noise25", 0.25)])
def test_judges_err_on_their_share_of_responses(judge: str, rate: float):
    judged = world.JUDGES[judge]
    wrong = []
    for question in draw("preference", 1500, 7):
        prompt = prompt_of(question)
        both = judged(prompt, question.right), judged(prompt, question.other)
        assert both == (judged(prompt, f" {question.right}\n"), judged(prompt, question.other))
        wrong += [both[0] == 0, both[1] == 1]
    assert np.mean(wrong) == pytest.approx(rate, abs=3 * (rate * (1 - rate) / 3000) ** 0.5)
    row = {"id": prompt.id, "domain": "sums", "extra": prompt.extra, "responses": [question.right]}
    assert world.verdict(row, judge) == judged(prompt, question.right)


def test_biased_judge():
    """He takes the other answer for right in whole villages, and errs as often everywhere."""
    right: dict[str, list[float]] = {}
    for question in draw("preference", 3000, 7):
        prompt = prompt_of(question)
        right.setdefault(question.village, []).append(world.biased(prompt, question.right))
        if world.biased(prompt, "neither"):
            assert world.noise10(prompt, "neither")
    means = {village: np.mean(found) for village, found in right.items()}
    inverted = [mean for mean in means.values() if mean < 0.5]
    assert len(inverted) / len(means) == pytest.approx(0.2, abs=0.1)
    assert np.mean(inverted) == pytest.approx(0.1, abs=0.04)
    assert np.mean([mean for mean in means.values() if mean > 0.5]) == pytest.approx(0.9, abs=0.03)


def test_beliefs_are_shared_by_both_pivots_and_differ_between_sets():
    """A model's text is right as often as it says: known, unsure or wrong."""
    assert models.beliefs("pivot", 1) == models.beliefs("big-pivot", 1)
    assert models.beliefs("pivot", 1) != models.beliefs("pivot", 2)
    held = models.beliefs("generalist", 0)
    shares = Counter(held.values())
    assert len(held) == 90
    kind = models.KINDS["generalist"]
    assert shares[models.KNOWN] / 90 == pytest.approx(kind.known, abs=0.15)
    assert shares[models.WRONG] / 90 == pytest.approx(kind.wrong, abs=0.13)
    right: dict[float, list[bool]] = {}
    for question, answer, rejected in models.pretraining_text("generalist", 0, 3000):
        assert {answer, rejected} == {question.right, question.other}
        cell = held[question.domain, question.text.split()[0]]
        right.setdefault(cell, []).append(answer == question.right)
    for cell, found in right.items():
        assert np.mean(found) == pytest.approx(cell, abs=0.06)


@pytest.mark.parametrize(
    "name", ["pivot", "generalist", "neighbour", "sums-expert", "turns-expert"]
)
def test_tokenizers_differ_and_keep_texts(name: str):
    """All give back the text; the pivot's tokens are characters, the others' are fewer."""
    tokenizer = models.make_tokenizer(models.KINDS[name])
    texts = [question.text for question in draw("sft", 60, 1)]
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    assert [tokenizer.decode(ids) for ids in rows] == texts
    tokens, characters = sum(map(len, rows)), sum(map(len, texts))
    assert tokens == characters if name == "pivot" else tokens < 0.95 * characters
    text = texts[0]
    chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "45"}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert whole == f"{asked}45{tokenizer.eos_token}"
