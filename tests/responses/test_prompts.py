"""Prompts of every form, as the data sets publish them."""

import json

import pytest

from megatron_infifpo.cli import UserError
from megatron_infifpo.responses.prompts import read_prompts

USER = {"role": "user", "content": "Say hi."}
RECORDS = {
    "own": {"id": "a", "domain": "law", "prompt": "Say hi."},
    "messages": {"id": "a", "domain": "law", "prompt": [USER]},
    "infinity": {
        "id": 17, "conversations": [
            {"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "hi"},
            {"from": "human", "value": "Again."},
        ],
    },
    "numina": {"problem": "Say hi.", "solution": "hi", "answer": "2", "source": "x"},
    "kodcode": {"question_id": "q1", "question": "Say hi.", "test": "assert f()", "style": "x"},
    "kodcode sft": {
        "question_id": "q1", "test": "assert f()",
        "conversations": [{"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "hi"}],
    },
}  # fmt: skip
EXPECTED = {
    "own": ("a", "law", {}),
    "messages": ("a", "law", {}),
    "infinity": ("17", "general", {}),
    "numina": ("p-0", "math", {"solution": "hi", "answer": "2"}),
    "kodcode": ("q1", "code", {"test": "assert f()"}),
    "kodcode sft": ("q1", "code", {"test": "assert f()"}),
}


@pytest.mark.parametrize("name", RECORDS)
def test_forms(tmp_path, name):
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORDS[name]))
    (prompt,) = read_prompts([str(tmp_path / "p.jsonl")])
    assert (prompt.id, prompt.domain, prompt.extra) == EXPECTED[name]
    assert list(prompt.messages) == [USER]


def test_a_choice_depends_on_the_ids_alone(tmp_path):
    lines = [json.dumps({"id": f"i{n}", "prompt": f"question {n}"}) for n in range(50)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl").write_text("\n".join(reversed(lines)))
    a = [prompt.id for prompt in read_prompts([f"{tmp_path}/a.jsonl=10"])]
    b = [prompt.id for prompt in read_prompts([f"{tmp_path}/b.jsonl=10"])]
    assert len(a) == 10 and a == b[::-1]
    assert a != [f"i{n}" for n in range(10)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"}', "no prompt: expected one of the fields prompt, problem, question"),
        ("[1]", "found list, expected an object"),
        ('{"prompt": [{"role": "assistant", "content": "x"}]}', "does not end with a user's"),
        ('{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}', "duplicate id 'a'"),
        ("{", "broken JSON"),
    ],
)
def test_bad_prompts_are_refused(tmp_path, line, message):
    (tmp_path / "p.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        read_prompts([str(tmp_path / "p.jsonl")])


def test_too_many_are_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(UserError, match="COUNT from 1 to its 1 prompts"):
        read_prompts([f"{tmp_path}/p.jsonl=2"])
