"""Prompts of every form, as the data sets publish them."""

import json

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.responses.prompts import read_prompts

USER = {"role": "user", "content": "Say hi."}
RECORDS = {
    "own": {"id": "a", "domain": "law", "prompt": "Say hi."},
    "messages": {"id": "a", "domain": "law", "prompt": [USER]},
    "infinity": {
        "id": 17, "conversations": [
            {"from": "human", "value": "Say hi."}, {"from": "gpt", "value": "hi"},
            {"from": "human", "value": "Again."}, {"from": "gpt", "value": "hi again"},
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
    asked = "Again." if name == "infinity" else "Say hi."
    assert prompt.messages[-1] == {"role": "user", "content": asked}
    assert len(prompt.messages) == (3 if name == "infinity" else 1)


SYSTEM = {"role": "system", "content": "Be brief."}
REPLIES = [[{"role": "assistant", "content": text}] for text in ("hi", "no")]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "now", "arguments": {}}]}
RESULT = {"role": "tool", "content": "noon"}
WHOLE = [USER, REPLIES[0][0], {"role": "user", "content": "Again."}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": WHOLE}, WHOLE),
        ({"messages": [SYSTEM, *WHOLE, *REPLIES[0]]}, [SYSTEM, *WHOLE]),
        (
            {"instruction": "Translate.", "input": "hi", "output": "salut"},
            [{"role": "user", "content": "Translate.\nhi"}],
        ),
        ({"system": "Be brief.", "prompt": "Say hi."}, [SYSTEM, USER]),
        ({"chosen": [*WHOLE, *REPLIES[0]], "rejected": [*WHOLE, *REPLIES[1]]}, WHOLE),
        (
            {"prompt": "Say hi.", "chosen": [USER, *REPLIES[0]], "rejected": [USER, *REPLIES[1]]},
            [USER],
        ),
        ({"prompt": "Say hi.", "chosen": "hi", "rejected": "no"}, [USER]),
        ({"prompt": "Say hi.", "chosen": "hi", "rejected": "hi"}, [USER]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Say hi."}]}]}, [USER]),
    ],
)
def test_conversations_are_whole(tmp_path, record, expected):
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    (prompt,) = read_prompts([str(tmp_path / "p.jsonl")])
    assert list(prompt.messages) == expected


def test_a_tool_spoke_last(tmp_path):
    """What a tool said is answered; what the data set answered is not there."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {}}}
    records = [
        {"messages": [USER, CALL, RESULT], "tools": json.dumps([tool])},
        {"messages": [USER, CALL, RESULT, REPLIES[0][0]], "tools": [tool],
         "chat_template_kwargs": {"enable_thinking": False}},
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)))
    first, second = read_prompts([str(tmp_path / "p.jsonl")])
    assert [message["role"] for message in first.messages] == ["user", "assistant", "tool"]
    assert first.tools == second.tools == (tool,)
    assert list(second.messages) == [USER]
    assert second.template_options == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("record", "domain"),
    [
        ({"question": "Lee has 3 pens.", "answer": "#### 5"}, "general"),
        ({"problem": "My car is broken."}, "general"),
        ({"problem": "x", "solution": "y", "source": "stackoverflow"}, "general"),
        ({"problem": "x", "solution": "y", "source": ["cn_k12"]}, "general"),
        ({"problem": "x", "solution": "y", "source": "cn_k12"}, "math"),
        ({"problem": "x", "solution": "y", "problem_type": "Algebra"}, "math"),
        ({"question_id": "q", "question": "x", "test": "assert f()"}, "code"),
        ({"question": "x", "test": "the oral one"}, "general"),
        ({"question": "x", "domain": "law"}, "law"),
    ],
)
def test_a_domain_is_not_a_field_s_name(tmp_path, record, domain):
    (tmp_path / "p.jsonl").write_text(json.dumps(record))
    (prompt,) = read_prompts([str(tmp_path / "p.jsonl")])
    assert prompt.domain == domain
    (prompt,) = read_prompts([str(tmp_path / "p.jsonl")], domain="mine")
    assert prompt.domain == ("law" if domain == "law" else "mine")


def test_what_is_not_used_is_said(tmp_path):
    records = [
        {"problem": "x", "solution": "y", "answer": "2", "problem_type": "Algebra", "source": "z"},
        {"prompt": [USER | {"weight": 0}], "chosen": "hi", "rejected": "no", "score": 3},
    ]
    (tmp_path / "p.jsonl").write_text("\n".join([*map(json.dumps, records), "{"]))
    report = ReadReport()
    read_prompts([str(tmp_path / "p.jsonl")], on_bad="skip", report=report)
    assert set(report.ignored) == {"problem_type", "source", "score", "(messages) weight"}
    assert len(report.skipped) == 1 and "p.jsonl:3" in report.skipped[0]


def test_ids_stay(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "id": 0}\n{"prompt": "x"}')
    assert [p.id for p in read_prompts([str(tmp_path / "p.jsonl")])] == ["0", "p-1"]


def test_an_equals_sign_in_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    (tmp_path / "a=b" / "x.jsonl").write_text('{"prompt": "x"}\n{"prompt": "y"}')
    (tmp_path / "n=1").mkdir()
    (tmp_path / "n=1" / "c=2.jsonl").write_text('{"prompt": "x", "id": "c"}')
    counts = {name: len(read_prompts([name])) for name in
              ("a=b/x.jsonl", "a=b/x.jsonl=1", "n=1/c=2.jsonl", "n=1/c=2.jsonl=1")}  # fmt: skip
    assert list(counts.values()) == [2, 1, 1, 1]
    with pytest.raises(UserError, match="a=c/x.jsonl: no such file, expected a file of prompts"):
        read_prompts(["a=c/x.jsonl"])


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
        ("[1]", "found a list .*, expected an object"),
        (
            '{"prompt": [{"role": "assistant", "content": "x"}]}',
            "last message is absent, expected a message of",
        ),
        ('{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}', "duplicate id 'a'"),
        ("{", "broken JSON"),
        (
            json.dumps({"prompt": "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"}),
            "'prompt' is rendered by a chat template already",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": "[INST] x [/INST]"}]}),
            "'prompt' is rendered by a chat template already",
        ),
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
