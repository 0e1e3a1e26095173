"""From responses to pairs: best, worst, the pivot's own best, and what is left out."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import plain_text, read_records, reply
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.choosing import choose_pair
from megatron_infifpo.responses.labels import Responses
from megatron_infifpo.responses.prompts import Prompt
from support import tiny

CHECKS = """
def length(prompt, response):
    return len(response)

def once(prompt, response):
    with open(__file__ + ".calls", "a") as file:
        print(prompt.id, file=file)
    return len(response)

def answer(prompt, response):
    return float(prompt.extra["answer"] in response)
"""
RESPONSES = {
    "pivot": {"p0": ["aa", "aaaa"], "p1": ["b 7"], "p2": ["same", "same"], "p3": ["x", "yy"]},
    "coder": {"p0": ["a", "aaaaaa", " "], "p1": ["c"], "p3": ["zzz"]},
}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "checks.py").write_text(CHECKS)
    paths = []
    for model, prompts in RESPONSES.items():
        path = tmp_path / f"{model}.jsonl"
        lines = [
            {"id": name, "domain": "math", "prompt": f"question {name}",
             "model": model, "responses": texts, "extra": {"answer": "7"}}
            for name, texts in prompts.items()
        ]  # fmt: skip
        path.write_text("\n".join(map(json.dumps, lines)))
        paths.append(str(path))
    return paths


@pytest.fixture
def label(files, tmp_path):
    def call(*flags: str, output: str = "pairs.jsonl"):
        argv = ["--input", *files, "--output", str(tmp_path / output), *flags]
        run_command("label", argv)
        found = read_records([tmp_path / output])
        return {r.id: tuple(map(plain_text, r.responses)) for r in found}

    return call


def test_best_and_worst(label, tmp_path, capsys):
    program = f"{tmp_path}/checks.py:length"
    assert label("--program", program) == {
        "p0": ("aaaaaa", "a"),
        "p1": ("b 7", "c"),
        "p3": ("zzz", "x"),
    }
    printed = capsys.readouterr().out
    assert "3 pairs of 4 prompts" in printed
    assert "left out 1: fewer than two different responses" in printed
    found = label("--program", program, "--pivot", "pivot", output="wrpo.jsonl")
    assert found["p0"] == ("aaaaaa", "a", "aaaa")
    assert found["p3"] == ("zzz", "x", "yy")
    scores = {record.id: record.scores for record in read_records([tmp_path / "wrpo.jsonl"])}
    assert scores == {"p0": (6, 1, 4), "p3": (3, 1, 2), "p1": (3, 1, 3)}


def test_a_checker_sees_the_answer(label, tmp_path, capsys):
    found = label("--program", f"{tmp_path}/checks.py:answer")
    assert found == {"p1": ("b 7", "c")}
    assert "left out 2: no contrast: all scores are equal" in capsys.readouterr().out


def test_scores_are_kept(label, tmp_path):
    """An interrupted command goes on, with a line that was cut short."""
    first = label("--program", f"{tmp_path}/checks.py:once")
    cache = tmp_path / "pairs.jsonl.scores"
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join([*lines[:2], lines[2][:20]]) + "\n")
    (tmp_path / "pairs.jsonl").unlink()
    calls = tmp_path / "checks.py.calls"
    calls.unlink()
    assert label("--program", f"{tmp_path}/checks.py:once") == first
    assert set(calls.read_text().split()) == {"p2", "p3"}
    # Another program has other scores.
    (tmp_path / "pairs.jsonl").unlink()
    (tmp_path / "checks.py").write_text(CHECKS.replace("return len", "return -len"))
    assert label("--program", f"{tmp_path}/checks.py:once")["p0"] == ("a", "aaaaaa")


def test_the_pivot_is_worst(tmp_path):
    """Its best response is never the rejected one, and a text may be of two models."""
    responses = Responses(Prompt("a", "math", ({"role": "user", "content": "x"},), {}))
    for text, model in (
        ("good", "coder"),
        ("bad", "pivot"),
        ("worse", "pivot"),
        (" bad ", "coder"),
    ):
        responses.add(Response(text), model)
    assert responses.models == [{"coder"}, {"pivot", "coder"}, {"pivot"}]
    record = choose_pair(responses, [1.0, 0.0, 0.0], "pivot")
    assert not isinstance(record, str)
    assert record.responses == (reply("good"), reply("worse"), reply("bad"))
    assert "worse than the best but the pivot's" in str(
        choose_pair(
            Responses(responses.prompt, [responses.given[0], {"pivot": Response("bad")}]),
            [1.0, 0.0],
            "pivot",
        )
    )


def test_reasoning_belongs_to_its_model():
    """In whichever order the models' responses are read."""
    given = [(Response("good", reasoning=name), name) for name in ("pivot", "coder")]
    given += [(Response("bad", reasoning=text), "pivot") for text in ("b", None, "a")]
    prompt = Prompt("a", "math", ({"role": "user", "content": "x"},), {})
    for order in (given, [*given[1::-1], *given[:1:-1]]):
        responses = Responses(prompt)
        for answer, model in order:
            responses.add(answer, model)
        record = choose_pair(responses, [1.0, 0.0], "pivot")
        assert not isinstance(record, str)
        found = [messages[0]["reasoning_content"] for messages in record.responses]
        assert found == ["coder", "a", "pivot"]


def test_reasoning_is_not_judged(files, label, tmp_path):
    """The answer is; a pair's replies have the reasoning for templates to render."""
    path = tmp_path / "coder.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    line |= {"responses": ["aaaaaa", "a", "aaa"], "finish_reasons": ["stop", "stop", "length"]}
    line |= {"reasoning": ["long", None, "x"], "chat_template_kwargs": {"effort": "low"}}
    line["tools"] = [{"type": "function", "function": {"name": "now"}}]
    path.write_text(json.dumps(line))
    pivot = tmp_path / "pivot.jsonl"
    pivot.write_text(json.dumps(line | {"model": "pivot", "responses": ["aa", "aaaa", "aaaaaaa"]}))
    label("--program", f"{tmp_path}/checks.py:length", "--pivot", "pivot")
    (record,) = read_records([tmp_path / "pairs.jsonl"])
    assert record.responses[0] == (
        {"role": "assistant", "content": "aaaaaa", "reasoning_content": "long"},
    )
    assert record.responses[1] == reply("a")
    assert record.responses[2] == reply("aaaa"), "the longest one was cut"
    assert record.tools == tuple(line["tools"])
    assert record.template_options == {"effort": "low"}


def test_cut_responses(files, label, tmp_path, capsys):
    """They are not judged, unless that is wanted."""
    for path in files:
        lines = [json.loads(line) for line in open(path)]
        lines = [line | {"finish_reasons": ["length"] * len(line["responses"])} for line in lines]
        open(path, "w").write("\n".join(map(json.dumps, lines)))
    with pytest.raises(
        UserError, match="no prompt gives a pair: .*; not judged [0-9]+ responses: cut"
    ):
        label("--program", f"{tmp_path}/checks.py:length")
    assert len(label("--program", f"{tmp_path}/checks.py:length", "--keep-cut")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": ["It is 4 \ud83d", "It is 5"]}, "holds half a surrogate pair"),
        ({"responses": "x"}, "no list of responses"),
        ({"finish_reasons": ["stop"]}, "'finish_reasons' is not a list with one entry a response"),
        ({"prompt": None}, "no prompt"),
    ],
)
def test_bad_lines(files, label, tmp_path, capsys, change, message):
    """One sentence, or left out and counted."""
    path = tmp_path / "pivot.jsonl"
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]))
    with pytest.raises(UserError, match=f"pivot.jsonl:1: .*{message}"):
        label("--program", f"{tmp_path}/checks.py:length")
    found = label("--program", f"{tmp_path}/checks.py:length", "--on-bad-record", "skip")
    assert found["p0"] == ("aaaaaa", "a"), "of the other model"
    assert "skipped 1 bad records" in capsys.readouterr().err


def test_reward_model(label, tmp_path):
    """Scores equal those of one unpadded chat at a time, with one BOS."""
    folder = tmp_path / "reward"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=4, vocab_size=320, num_labels=1)
    network = LlamaForSequenceClassification(config).eval()
    network.save_pretrained(folder)
    tiny.save_tokenizer(folder, 300)
    found = label("--reward-model", str(folder), "--batch", "3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = {}
    for text in ("aa", "aaaa", "a", "aaaaaa"):
        chat = [{"role": "user", "content": "question p0"}, {"role": "assistant", "content": text}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), return_tensors="pt")
        with torch.no_grad():
            scores[text] = network(input_ids=ids["input_ids"]).logits.item()
    assert found["p0"] == (max(scores, key=scores.__getitem__), min(scores, key=scores.__getitem__))
    kept = (tmp_path / "pairs.jsonl.scores").read_text().splitlines()
    entry = next(entry for entry in map(json.loads, kept) if entry["id"] == "p0")
    by_text = dict(zip(entry["responses"], entry["scores"], strict=True))
    assert by_text == pytest.approx(scores, abs=1e-5)


def test_prompts_that_the_reward_model_refuses(files, label, tmp_path):
    """Its template raises for one of them; a folder that is not there is a sentence."""
    folder = tmp_path / "reward"
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=4, vocab_size=320, num_labels=1)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tiny.save_tokenizer(folder, 300)
    (folder / "chat_template.jinja").write_text(
        "{% if 'p0' in messages[0].content %}{{ raise_exception('not p0') }}{% endif %}"
        + tiny.TEMPLATE
    )
    with pytest.raises(
        UserError, match="'p0': the reward model's chat template refuses it .not p0"
    ):
        label("--reward-model", str(folder))
    found = label("--reward-model", str(folder), "--on-bad-record", "skip")
    assert set(found) == {"p1", "p3"}
    # What it would leave out: a prompt with tools, and all turns but the last two.
    (folder / "chat_template.jinja").write_text(tiny.TEMPLATE.replace("messages", "messages[-2:]"))
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    for name, change, said in (
        ("p1", {"tools": tools}, "it does not write tools"),
        ("p3", {"prompt": [*turns, {"role": "user", "content": "x"}]}, "a message of role user"),
    ):
        for path in map(Path, files):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            changed = [line | change if line["id"] == name else line for line in lines]
            path.write_text("\n".join(map(json.dumps, changed)))
        with pytest.raises(UserError, match=f"'{name}': the reward model's .*{said}"):
            label("--reward-model", str(folder), output=f"{name}.jsonl")
        for path in map(Path, files):
            kept = [line for line in path.read_text().splitlines() if f'"{name}"' not in line]
            path.write_text("\n".join(kept))
    with pytest.raises(UserError, match="none is not a folder"):
        label("--reward-model", str(tmp_path / "none"), output="b.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--program", "none.py:f"], "none.py: no such file"),
        (["--program", "none.py"], "expected FILE.py:FUNCTION"),
        (["--program", "CHECKS:nothing"], "has no function 'nothing'"),
        (["--program", "CHECKS:length", "--pivot", "phi"], "expected one of coder, pivot"),
    ],
)
def test_refused(label, tmp_path, flags, message):
    flags = [flag.replace("CHECKS", f"{tmp_path}/checks.py") for flag in flags]
    with pytest.raises(UserError, match=message):
        label(*flags)


def test_other_files_are_refused(label, files, tmp_path):
    with pytest.raises(UserError, match="no.jsonl: .* a file of responses that infifpo sample wr"):
        run_command("label", ["--input", "no.jsonl", "--program", "p:f", "--output", "o.jsonl"])
    (tmp_path / "coder.jsonl").write_text('{"id": "p0", "prompt": "x"}')
    with pytest.raises(UserError, match="coder.jsonl:1: no list of responses"):
        label("--program", f"{tmp_path}/checks.py:length")
