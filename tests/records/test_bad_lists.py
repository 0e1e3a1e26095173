"""Lists that cannot be read: what is wrong, where, and what to do."""

import math
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import ReadReport, read_records
from support.chats import QUESTION, THREE, TWO, said
from support.datasets import write_jsonl

GOOD: dict[str, Any] = {"id": "ok", "prompt": "1+1?", "responses": ["2", "3", "4"]}
SAMPLED = GOOD | {"finish_reasons": ["stop", "length", "stop"]}
SHORT = "--on-bad-record skip leaves such records out"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no list": (dict(GOOD, responses="2"), "field 'responses' is a string ('2'), expected a list"),
    "none": (
        dict(GOOD, responses=[]),
        f"field 'responses' is a list of 0, expected at least 2 responses that have an answer; "
        f"{SHORT}",
    ),
    "one": (
        dict(GOOD, responses=["2"]),
        f"field 'responses' is a list of 1, expected at least 2 responses that have an answer; "
        f"{SHORT}",
    ),
    "all equal": (
        dict(GOOD, responses=["2", " 2", "2\n"]),
        f"all 3 responses in 'responses' are equal ('2'), expected two that differ; {SHORT}",
    ),
    "an empty one": (
        dict(GOOD, responses=["2", " ", "3"]),
        "field 'responses[1]' is empty (' '), expected",
    ),
    "one answer of a model's": (
        dict(SAMPLED, responses=["2", "", " "], reasoning=["so", "so far", None]),
        "field 'responses' is a list of 1, expected at least 2 responses that have an answer",
    ),
    "an immense score": (
        dict(GOOD, responses=["2", "3"], scores=[1, 1e39]),
        "a score is 1e+39, expected one of at most 1e+18 in size",
    ),
    "no text": (
        dict(GOOD, responses=["2", 3]),
        "field 'responses[1]' is a number (3), expected a string",
    ),
    "null": (dict(GOOD, responses=["2", None]), "field 'responses[1]' is null (None), expected"),
    "objects": (
        dict(GOOD, responses=[{"text": "2", "score": 1}, {"text": "3", "score": 2}]),
        "message 'responses[0][0]' has text, score, expected role and content",
    ),
    "no reply": (
        dict(GOOD, responses=["2", [*TWO, *QUESTION]]),
        "after the prompt, expected a reply",
    ),
    "no prompt": ({"id": "b", "responses": ["2", "3"]}, "field 'prompt' is missing or empty"),
    "an empty prompt": (dict(GOOD, prompt=" "), "the prompt's last message is"),
    "one whole": (
        dict(GOOD, responses=["2", QUESTION + THREE]),
        "field 'responses[1]' is a whole conversation and 'responses[0]' a reply, expected all of",
    ),
    "prompts differ": (
        dict(GOOD, responses=[QUESTION + TWO, QUESTION + THREE, said("u:2+2?", "a:4")]),
        "'responses[0]' (2 messages) and 'responses[2]' (2) differ first in message 0 (of roles",
    ),
    "another prompt": (
        dict(GOOD, prompt="2+2?", responses=[QUESTION + TWO, QUESTION + THREE]),
        "field 'prompt' has '2+2?', where the conversations in 'responses[0]' and 'responses[1]'",
    ),
    "rendered": (
        dict(GOOD, responses=["2", "3<|im_end|>"]),
        "'responses[1]' is rendered by a chat template",
    ),
    "few scores": (
        dict(GOOD, scores=[1, 2]),
        "field 'scores' is a list of 2, expected a list with one entry for each of the 3 responses",
    ),
    "one score": (dict(GOOD, scores=1), "field 'scores' is a number (1), expected a list with one"),
    "a text": (
        dict(GOOD, scores=[1, "good", 2]),
        "field 'scores[1]' is a string ('good'), expected a number",
    ),
    "a truth": (
        dict(GOOD, rewards=[1, 2, True]),
        "field 'rewards[2]' is a boolean (True), expected a number",
    ),
    "infinite": (
        dict(GOOD, scores=[1, 2, math.inf]),
        "field 'scores[2]' is a number (inf), expected a number",
    ),
    "few reasons": (
        dict(GOOD, finish_reasons=["stop"]),
        "field 'finish_reasons' is a list of 1, expected",
    ),
    "a reason": (
        dict(GOOD, finish_reasons=["stop", "content_filter", None]),
        "'finish_reasons[1]' is 'content_filter', expected one of stop, tool_calls, unknown, "
        "length ('length': it was cut); leave out what ended otherwise",
    ),
    "reasoning": (
        dict(GOOD, reasoning="so"),
        "field 'reasoning' is a string ('so'), expected a list",
    ),
    "reasoning's kind": (
        dict(SAMPLED, reasoning=[1, None, None]),
        "'responses[0][0].reasoning_content' is a number",
    ),
    "calls": (dict(SAMPLED, tool_calls=[[1], None, None]), "has tool_calls with a number"),
    "reasoning beside messages": (
        dict(SAMPLED, responses=["2", THREE, "4"], reasoning=[None, "so", None]),
        "beside an entry of 'reasoning' or 'tool_calls', expected a text",
    ),
    "no answer": (
        {"id": "n", "prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"rank": 2}]},
        "field 'answers[1].answer' is missing, expected a list of objects with answer",
    ),
    "one answer": (
        {"id": "n", "prompt": "q", "answers": [{"answer": "a", "rank": 1}]},
        "field 'answers' is a list of 1, expected at least 2",
    ),
    "an empty answer": (
        {"id": "n", "instruction": "q", "completions": [{"response": "a"}, {"response": ""}]},
        "field 'completions[1].response' is empty",
    ),
    "no rank": (
        {
            "id": "n",
            "prompt": "q",
            "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": "x"}],
        },
        "field 'answers[1].rank' is a string ('x'), expected a number",
    ),
    "a pair": (
        {"id": "n", "prompt": "q", "chosen": "2", "rejected": "3"},
        "found a pair although the first record is a list; expected records of one kind",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_list_is_named_and_can_be_skipped(tmp_path, name):
    bad, message = BAD[name]
    path = write_jsonl(tmp_path / "t.jsonl", GOOD, dict(bad, id="bad"), dict(GOOD, id="z"))
    with pytest.raises(UserError) as caught:
        read_records(path, lists=True)
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)
    report = ReadReport()
    found = read_records(path, lists=True, on_bad="skip", report=report)
    assert [r.id for r in found] == ["ok", "z"] and report.skipped == [str(caught.value)]
