"""Lists of responses: those of users, of infifpo sample, of data sets that rate several."""

import csv
import json
import math
from dataclasses import replace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.lists import NO_REPLIES
from megatron_infifpo.records.messages import BadRecordError, reply
from megatron_infifpo.records.records import (
    PreferenceRecord,
    ReadReport,
    parse_record,
    read_records,
    records_fingerprint,
)
from megatron_infifpo.records.split import to_json
from megatron_infifpo.responses.answers import Response
from megatron_infifpo.responses.completing import Answers, Wanted, to_line
from megatron_infifpo.responses.prompts import Prompt, parse_prompt
from support.chats import CALLING, QUESTION, SUM, THREE, TWO, said
from support.datasets import record, write_jsonl

HUMAN = "\n\nHuman: 1+1?\n\nAssistant:"
FOUR = said("a:4")
REPLIES = tuple(TWO), tuple(THREE), tuple(FOUR)
TEXTS: dict[str, Any] = {"prompt": "1+1?", "responses": ["2", "3", "4"]}
NAN = math.nan

# Name: (record, its prompt, responses, scores, what is not used).
EXAMPLES: dict[str, tuple[dict[str, Any], list, tuple, tuple | None, set[str]]] = {
    "texts": (TEXTS, QUESTION, REPLIES, None, set()),
    "scores": (TEXTS | {"scores": [1, None, -0.5]}, QUESTION, REPLIES, (1.0, NAN, -0.5), set()),
    "rewards": (
        TEXTS | {"rewards": [1, 2, NAN], "scores": None},
        QUESTION,
        REPLIES,
        (1.0, 2.0, NAN),
        set(),
    ),
    "scores in texts, as tables have them": (
        TEXTS | {"scores": '["1", null, 3]'},
        QUESTION,
        REPLIES,
        (1.0, NAN, 3.0),
        set(),
    ),
    "no score at all": (TEXTS | {"scores": [None, NAN, None]}, QUESTION, REPLIES, None, set()),
    "two names for scores": (
        TEXTS | {"scores": [1, 2, 3], "rewards": [3, 2, 1]},
        QUESTION,
        REPLIES,
        (1.0, 2.0, 3.0),
        {"rewards"},
    ),
    "messages": (
        {"question": "1+1?", "responses": [TWO, THREE[0], "4"]},
        QUESTION,
        REPLIES,
        None,
        set(),
    ),
    "conversations": (
        {"system": "s", "responses": [QUESTION + TWO, QUESTION + THREE, QUESTION + FOUR]},
        said("s:s", "u:1+1?"),
        REPLIES,
        None,
        set(),
    ),
    "conversations beside their prompt": (
        {"prompt": "1+1?", "responses": [QUESTION + TWO, QUESTION + THREE, QUESTION + FOUR]},
        QUESTION,
        REPLIES,
        None,
        set(),
    ),
    "conversations that part early": (
        {
            "responses": [
                said("u:hi", "a:x", "u:y", "a:2"),
                said("u:hi", "a:x", "u:y", "a:3"),
                said("u:hi", "a:4"),
            ]
        },
        said("u:hi"),
        (tuple(said("a:x", "u:y", "a:2")), tuple(said("a:x", "u:y", "a:3")), tuple(FOUR)),
        None,
        set(),
    ),
    "Anthropic's conversations": (
        {"responses": [f"{HUMAN} 2", f"{HUMAN} 3", f"{HUMAN} 4"]},
        QUESTION,
        REPLIES,
        None,
        set(),
    ),
    "some of them equal": (
        TEXTS | {"responses": ["2", "2", "3"]},
        QUESTION,
        (REPLIES[0], REPLIES[0], REPLIES[1]),
        None,
        set(),
    ),
    "other fields": (
        TEXTS | {"pivot_chosen": "2", "models": ["a"], "model": "m"},
        QUESTION,
        REPLIES,
        None,
        {"pivot_chosen", "models", "model"},
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("lists", [False, True])
def test_a_list_becomes_this_record(name, lists):
    value, prompt, responses, scores, unused = EXAMPLES[name]
    found, ignored = parse_record(value, default_id="d-0", lists=lists)
    expected = PreferenceRecord("d-0", "general", tuple(prompt), responses, scores, listed=True)
    assert repr(found) == repr(expected) and ignored == unused
    assert found.names == tuple(f"response_{i}" for i in range(len(responses)))
    assert parse_record(to_json(found), default_id="x") == (found, set())


TIED = {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 1}]}
RATED: dict[str, tuple[dict[str, Any], tuple, tuple[str, ...], tuple | None]] = {
    "Nectar": (
        {
            "prompt": HUMAN,
            "answers": [
                {"answer": "x", "rank": 2, "model": "m"},
                {"answer": "2", "rank": 1},
                {"answer": "3", "rank": 7},
            ],
        },
        (("2",), ("3",)),
        ("x", "2", "3"),
        (-2.0, -1.0, -7.0),
    ),
    "UltraFeedback": (
        {
            "instruction": "1+1?",
            "completions": [
                {"response": "x", "overall_score": 3, "fine-grained_score": 4.5, "annotations": {}},
                {"response": "2", "overall_score": 9.5},
                {"response": "3", "overall_score": "1"},
            ],
        },
        (("2",), ("3",)),
        ("x", "2", "3"),
        (3.0, 9.5, 1.0),
    ),
    "UltraFeedback, not all rated": (
        {
            "instruction": "1+1?",
            "completions": [
                {"response": "x"},
                {"response": "2", "overall_score": 9.5},
                {"response": "3", "overall_score": None},
                {"response": "4", "overall_score": NAN},
            ],
        },
        (),
        ("x", "2", "3", "4"),
        (NAN, 9.5, NAN, NAN),
    ),
    "NeMo-RL": (
        {
            "context": QUESTION,
            "completions": [{"rank": 1, "completion": THREE}, {"rank": 0, "completion": TWO}],
        },
        (("2",), ("3",)),
        ("3", "2"),
        (-1.0, 0.0),
    ),
    "a tie": (TIED, (), ("a", "b"), (-1.0, -1.0)),
}


@pytest.mark.parametrize("name", RATED)
def test_rated_responses_are_a_pair_or_a_list(name):
    value, two, texts, scores = RATED[name]
    if two:
        pair, _ = parse_record(value, default_id="d")
        assert [m["content"] for r in pair.responses for m in r] == [t for (t,) in two]
        assert not pair.listed and pair.scores is None
    else:
        with pytest.raises(BadRecordError):
            parse_record(value, default_id="d")
    found, ignored = parse_record(value, default_id="d", lists=True)
    assert found.responses == tuple(map(reply, texts)) and found.listed
    assert repr(found.scores) == repr(scores) and "-0.0" not in repr(scores)
    assert ignored == {
        f"{f}.{k}" for f in ("answers", "completions") for i in value.get(f, ()) for k in i
    } & {"answers.model", "completions.fine-grained_score", "completions.annotations"}


GOOD = {"id": "ok", **TEXTS}


def test_rated_and_listed_responses_go_together_as_lists_only(tmp_path):
    nectar = dict(RATED["Nectar"][0], id="n")
    path = write_jsonl(tmp_path / "t.jsonl", nectar, GOOD)
    assert [len(r.responses) for r in read_records(path, lists=True)] == [3, 3]
    with pytest.raises(UserError, match=r":2: found a list although .* is a pair; .*\(--lists"):
        read_records(path)


def test_what_infifpo_sample_writes_is_a_list(tmp_path):
    calls: Any = CALLING["tool_calls"]
    prompt = Prompt(
        "m-1", "math", tuple(QUESTION), {"answer": "2"}, (SUM,), {"enable_thinking": True}
    )
    given = [
        Response("2", reasoning="so"),
        Response("It is", "length"),
        Response("", "tool_calls", None, tuple(calls)),
        Response('[{"role": "user", "content": "x"}]', "unknown"),
        Response(HUMAN + " 2"),
        Response("{'role': 'a'}"),
    ]
    line = to_line(prompt, Answers(given), Wanted(8, keep_cut=True), "phi")
    path = write_jsonl(tmp_path / "phi.jsonl", line)
    report = ReadReport()
    (found,) = read_records(path, report=report)
    assert found == PreferenceRecord(
        "m-1",
        "math",
        tuple(QUESTION),
        tuple((r.message(),) for r in given),
        None,
        True,
        (False, True, False, False, False, False),
        (SUM,),
        {"enable_thinking": True},
    )
    assert not report.ignored and not report.skipped
    assert parse_record(to_json(found), default_id="d") == (found, set())
    assert parse_prompt(line, "d").messages == prompt.messages
    few = to_line(prompt, Answers(given[:1]), Wanted(8), "phi")
    with pytest.raises(BadRecordError, match="'responses' is a list of 1, .*--on-bad-record skip"):
        parse_record(few, default_id="d")


def test_sampled_responses_without_an_answer_are_left_out(tmp_path):
    """Such as one that was cut within its reasoning; the others and their columns stay."""
    line = {
        "id": "m-1",
        "prompt": "1 + 1?",
        "responses": ["", "2", "<think>so</think> ", "3", "4</s>"],
        "reasoning": ["so far", None, None, "so", None],
        "finish_reasons": ["length", "stop", "stop", "length", "stop"],
        "scores": [0.5, 1, 2, 3, 4],
    }
    report = ReadReport()
    (found,) = read_records(write_jsonl(tmp_path / "phi.jsonl", line), report=report)
    assert [messages[0]["content"] for messages in found.responses] == ["2", "3"]
    assert found.responses[1][0]["reasoning_content"] == "so"
    assert found.scores == (1.0, 3.0) and found.cut == (False, True)
    assert report.ignored == {NO_REPLIES: 1}
    del line["finish_reasons"], line["reasoning"]
    with pytest.raises(BadRecordError, match=r"'responses\[0\]' is empty"):
        parse_record(line, default_id="d")  # of a list that is not sampled each is meant


def test_lists_in_tables(tmp_path):
    values: list[dict[str, Any]]
    values = [
        GOOD | {"scores": [1, None, 2.5]},
        GOOD | {"id": "b", "responses": ["x", "y"], "scores": None},
    ]
    expected = read_records(write_jsonl(tmp_path / "t.jsonl", *values))
    assert [len(r.responses) for r in expected] == [3, 2] and expected[1].scores is None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "t.parquet")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[*values[0]])
        writer.writeheader()
        for value in values:
            cells = {
                k: v if isinstance(v, str) else json.dumps(v)
                for k, v in value.items()
                if v is not None
            }
            writer.writerow(cells)
    for name in ("t.parquet", "t.csv"):
        assert repr(read_records(tmp_path / name)) == repr(expected), name


def test_fingerprints_of_pairs_are_those_of_before_lists(shared_data):
    """Else all log-probs that are stored would be of other records."""
    found = records_fingerprint(read_records(shared_data / "dpo_en_demo.json"))
    assert found == "6ff7bd3ed481067a962c9394c10712b8ac26f613fccddc2abbaecda1103dd127"


def test_a_fingerprint_covers_what_models_see():
    base = parse_record(TEXTS | {"scores": [1, 2, 3]}, default_id="d")[0]

    def same(other):
        return records_fingerprint([other]) == records_fingerprint([base])

    assert same(replace(base, scores=None)) and same(replace(base, scores=(NAN, 0.0, 1.0)))
    assert same(replace(base, cut=(False,) * 3)), "nothing is cut"
    assert not same(replace(base, cut=(False, True, False)))
    assert not same(replace(base, responses=base.responses[::-1]))
    assert not same(replace(base, responses=base.responses[:2]))
    pair = record(1)
    assert records_fingerprint([replace(pair, scores=(1.0, 0.0))]) == records_fingerprint([pair])
