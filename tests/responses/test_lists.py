"""From responses to lists with scores: what was sampled, in its order, judged once."""

import json
import math
import random
from collections import Counter

import pytest

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import plain_text, read_records
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.choosing import choose_list
from megatron_infifpo.responses.labels import Responses
from megatron_infifpo.responses.prompts import Prompt

CHECKS = """
from megatron_infifpo.responses.programs import UnjudgedError

def length(prompt, response):
    with open(__file__ + ".calls", "a") as file:
        print(prompt.id, response, file=file)
    return len(response) + prompt.extra["more"]

def same(prompt, response):
    return 1

def some(prompt, response):
    if prompt.id == "p0":
        raise UnjudgedError("'p0': it is p0", "it is p0")
    return float("nan") if response == "c" else len(response)
"""
POLICY = {
    "p0": ["aa", "b", "aa", "aaaa", "b"],
    "p1": ["x", "x", "yyy"],
    "p2": ["same", "same", "same", "same", "other"],
    "p3": ["c"],
}


def write(path, model, prompts, **more):
    lines = [
        {"id": name, "domain": "math", "prompt": f"question {name}", "model": model,
         "responses": texts, "extra": {"more": 10 * (name == "p1")}, **more}
        for name, texts in prompts.items()
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def policy(tmp_path):
    return write(tmp_path / "policy.jsonl", "policy", POLICY)


@pytest.fixture
def label(tmp_path):
    """Run `infifpo label` on files, and read what it wrote: records by their ids."""
    (tmp_path / "checks.py").write_text(CHECKS)

    def call(inputs: list[str], *flags: str, function: str = "length", output: str = "lists.jsonl"):
        argv = ["--input", *inputs, "--output", str(tmp_path / output), *flags]
        run_command("label", [*argv, "--program", f"{tmp_path}/checks.py:{function}"])
        return {record.id: record for record in read_records([tmp_path / output])}

    return call


def texts(record):
    return [plain_text(reply) for reply in record.responses]


def test_a_list_is_what_was_sampled(label, policy, tmp_path, capsys):
    """Equal responses stay, in their order; each has the score of its text."""
    found = label([policy], "--list", "4")
    assert {name: texts(record) for name, record in found.items()} == {
        "p0": ["aa", "b", "aa", "aaaa"],
        "p1": ["x", "x", "yyy"],
    }
    assert found["p0"].scores == (2, 1, 2, 4) and found["p1"].scores == (11, 11, 13)
    assert all(record.listed and not record.cut for record in found.values())
    assert found["p1"].names == ("response_0", "response_1", "response_2")
    said = capsys.readouterr().out
    assert "lists.jsonl: 2 lists of 4 prompts\n  7 responses\n" in said
    assert "1 lists have 3 responses, fewer than 4" in said
    assert "left out 2: fewer than two different responses" in said, "p2's first four, and p3"
    asked = Counter((tmp_path / "checks.py.calls").read_text().splitlines())
    assert set(asked.values()) == {1} and len(asked) == 8, "every text once"


@pytest.mark.parametrize("longest", [2, 3, 5, 40])
def test_scores_choose_nothing(longest):
    """Which responses are there is the same for any scores, and each keeps its own."""
    rng = random.Random(longest)
    responses = Responses(Prompt("a", "math", ({"role": "user", "content": "x"},), {}))
    sampled = ["first", *rng.choices("abcdef", k=20)]
    for text in sampled:
        responses.add(Response(text), "policy")
    for _ in range(20):
        scores = [rng.choice([0.0, 1.0, rng.gauss(0, 1)]) for _ in responses.given]
        by_text = {answer.text: s for answer, s in zip(responses.answers, scores, strict=True)}
        record = choose_list(responses, scores, longest)
        assert not isinstance(record, str)
        assert texts(record) == sampled[:longest]
        assert record.scores == tuple(by_text[text] for text in sampled[:longest])


def test_models_take_turns(label, policy, tmp_path):
    """The first of each, in the order of the files, then the second of each."""
    coder = write(tmp_path / "coder.jsonl", "coder", {"p0": ["z", "aa"], "p3": ["c", "dd"]})
    found = label([policy, coder], "--list", "4")
    assert texts(found["p0"]) == ["aa", "z", "b", "aa"]
    assert texts(found["p3"]) == ["c", "c", "dd"]
    found = label([coder, policy], "--list", "9", output="other.jsonl")
    assert texts(found["p0"]) == ["z", "aa", "aa", "b", "aa", "aaaa", "b"]


def test_equal_scores(label, policy):
    """They make no pair, but a list: the reference still tells its responses apart."""
    found = label([policy], "--list", "8", function="same")
    assert found["p2"].scores == (1, 1, 1, 1, 1) and set(found) == {"p0", "p1", "p2"}
    with pytest.raises(UserError, match="no prompt gives a pair: .*no contrast"):
        label([policy], function="same", output="pairs.jsonl")


@pytest.mark.parametrize("flags", [[], ["--keep-cut"], ["--keep-cut", "--cut-penalty", "1.5"]])
def test_cut_responses(label, tmp_path, capsys, flags):
    """Left out; or kept, marked, and for a price; also where a whole one has the same text."""
    reasons = ["stop", "length", "length", "stop"]
    path = write(
        tmp_path / "policy.jsonl", "policy", {"p0": ["a", "bbb", "a", "cc"]}, finish_reasons=reasons
    )
    (record,) = label([path], "--list", "4", *flags).values()
    penalty = 1.5 if len(flags) > 1 else 0
    if flags:
        assert texts(record) == ["a", "bbb", "a", "cc"]
        assert record.scores == (1, 3 - penalty, 1 - penalty, 2)
        assert record.cut == (False, True, True, False)
    else:
        assert texts(record) == ["a", "cc"] and record.scores == (1, 2) and not record.cut
        assert "not judged 2 responses: cut" in capsys.readouterr().out
    line = json.loads((tmp_path / "lists.jsonl").read_text())
    assert line.get("finish_reasons") == (reasons if flags else None)
    (pair,) = label([path], *flags[:1], output="pairs.jsonl").values()
    assert texts(pair) == ["bbb" if flags else "cc", "a"]
    assert pair.cut == ((True, False) if flags else ()), "a text is cut where no whole one has it"


def test_reasoning_and_calls(label, tmp_path, capsys):
    """Each response keeps its own; one that is cut within its reasoning says nothing."""
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    more = {
        "reasoning": ["because", None, "so", "hmm", None, None],
        "tool_calls": [None, None, None, None, [call], None],
        "finish_reasons": ["stop", "stop", "stop", "length", "tool_calls", "stop"],
    }
    # Commands that read records would refuse the last one.
    given = {"p0": ["a", "a", "[1]", "", "look", "b</s>"]}
    path = write(tmp_path / "policy.jsonl", "policy", given, **more)
    (record,) = label([path], "--list", "8", "--keep-cut").values()
    assert [m["content"] for (m,) in record.responses] == ["a", "a", "[1]", "look"]
    assert [m.get("reasoning_content") for (m,) in record.responses] == [
        "because",
        None,
        "so",
        None,
    ]
    assert record.responses[3][0]["tool_calls"] == [call]
    assert record.scores == (1, 1, 3, 4)
    said = capsys.readouterr().out
    assert "not judged 1 responses: cut" in said
    assert "not judged 1 responses: with marks of a chat template" in said


def test_scores_are_shared_with_pairs(label, policy, tmp_path):
    """Both keep scores by judged text in one form of file; an interrupted command goes on."""
    label([policy], output="both.jsonl")
    cache, calls = tmp_path / "both.jsonl.scores", tmp_path / "checks.py.calls"
    before = cache.read_bytes()
    (tmp_path / "both.jsonl").unlink()
    calls.unlink()
    found = label([policy], "--list", "4", output="both.jsonl")
    assert not calls.exists() and cache.read_bytes() == before
    (tmp_path / "both.jsonl").unlink()
    lines = before.splitlines()
    cache.write_bytes(b"\n".join([*lines[:1], lines[1][:30]]))  # killed while it wrote
    assert label([policy], "--list", "4", output="both.jsonl") == found
    assert {line.split()[0] for line in calls.read_text().splitlines()} == {"p1", "p2", "p3"}
    (tmp_path / "both.jsonl").unlink()
    calls.unlink()
    assert label([policy], "--list", "4", output="both.jsonl") == found and not calls.exists()


def test_prompts_that_are_not_judged(label, policy, tmp_path, capsys):
    """One that the judge refuses is an error or counted, and one whose score is no number."""
    coder = write(tmp_path / "coder.jsonl", "coder", {"p3": ["dd"]})
    with pytest.raises(UserError, match="'p0': it is p0"):
        label([policy, coder], "--list", "4", function="some")
    found = label([policy, coder], "--list", "5", "--on-bad-record", "skip", function="some")
    assert set(found) == {"p1", "p2"}
    said = capsys.readouterr().out
    assert "left out 1: it is p0; the first: 'p0': it is p0" in said
    assert "left out 1: a score is not a finite number; the first: nan, of prompt 'p3'" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--list", "4", "--pivot", "policy"], "--pivot has no effect with --list"),
        (["--list", "4", "--cut-penalty", "1"], "--cut-penalty has no effect without --list and"),
        (["--keep-cut", "--cut-penalty", "1"], "--cut-penalty has no effect without --list and"),
    ],
)
def test_refused(label, policy, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        label([policy], *flags)
    assert not (tmp_path / "lists.jsonl.scores").exists()


def test_from_a_model_to_lists_and_on(label, sample, tmp_path):
    """What `infifpo sample` writes, whole; and a list is a prompt of the next round."""
    flags = ["--temperature", "1", "--keep-cut", "--check", "0", "--count", "6"]
    lines = {line["id"]: line for line in sample(*flags)}
    for line in lines.values():
        line["extra"]["more"] = 0.5
    path = tmp_path / "policy.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    found = label([str(path)], "--list", "5", "--keep-cut")
    assert len(found) > 5 and any(record.cut for record in found.values())
    for name, record in found.items():
        sampled = [t.strip() for t in lines[name]["responses"]]
        assert [m["content"].strip() for (m,) in record.responses] == sampled[:5]
        assert record.scores is not None
        for (message,), score in zip(record.responses, record.scores, strict=True):
            assert (
                math.isclose(score, len(message["content"]) + 0.5)
                or sampled.count(message["content"].strip()) > 1
            ), "equal but for white space: judged once"
        cut = [reason == "length" for reason in lines[name]["finish_reasons"][:5]]
        assert list(record.cut or [False] * 5) == cut
    again = sample("--input", str(tmp_path / "lists.jsonl"), "--check", "0", output="again.jsonl")
    assert {line["id"]: line["prompt"] for line in again} == {
        name: lines[name]["prompt"] for name in found
    }
