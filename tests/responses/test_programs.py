"""Judges of the user's that do not work: what is said, and what is left out."""

import json
from pathlib import Path

import pytest

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError

JUDGE = """from dataclasses import dataclass

import numpy as np

def boom(prompt, response):
    return float(response == prompt.extra["answer"])

def none(prompt, response):
    print(response)

def text(prompt, response):
    return str(len(response))

def single(prompt, response):
    return np.float32(len(response) / 2)
"""


@pytest.fixture
def label(tmp_path, monkeypatch):
    """Run `infifpo label` with a function of judge.py."""
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(JUDGE)
    lines: list[dict[str, object]] = [
        {"id": f"q{i}", "prompt": "?", "responses": ["no", "yes"], "extra": {"answer": "yes"}}
        for i in range(3)
    ]
    lines[1]["extra"] = {}
    Path("sampled.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def call(program: str, *flags: str):
        words = ["--input", "sampled.jsonl", "--output", "pairs.jsonl", "--program", program]
        run_command("label", [*words, *flags])
        return [json.loads(line) for line in Path("pairs.jsonl").open()]

    return call


def test_one_that_raises(label, capsys):
    said = r"judge.py:boom raised KeyError\('answer'\) on response 1 of prompt 'q1' \(judge.py line"
    with pytest.raises(UserError, match=f"^{said} 6\\)$"):
        label("judge.py:boom")
    found = label("judge.py:boom", "--on-bad-record", "skip")
    assert [record["id"] for record in found] == ["q0", "q2"]
    printed = capsys.readouterr().out
    assert "left out 1: judge.py:boom raised KeyError; the first: judge.py:boom raised" in printed


@pytest.mark.parametrize(("program", "value"), [("none", "None"), ("text", "'2'")])
def test_one_that_returns_no_number(label, program, value):
    said = f"no prompt gives a pair: left out 3: a score is not a finite number; the first: {value}"
    with pytest.raises(UserError, match=f"^{said}, of prompt 'q0'$"):
        label(f"judge.py:{program}")


def test_numbers_of_numpy(label):
    assert {record["score_chosen"] for record in label("judge.py:single")} == {1.5}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere", r"ModuleNotFoundError\(.No module named 'nowhere'.\) \(bad.py line 1\)"),
        ("\ndef f(:", r"SyntaxError: invalid syntax \(bad.py line 2\)"),
        ("raise SystemExit(3)", r"SystemExit\(3\) \(bad.py line 1\)"),
    ],
)
def test_one_that_cannot_be_imported(label, code, message):
    Path("bad.py").write_text(code)
    with pytest.raises(UserError, match=f"bad.py:f: bad.py cannot be imported: {message}"):
        label("bad.py:f")
