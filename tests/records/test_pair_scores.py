"""Scores and cut responses of pairs: by several names, and never by something else."""

import math
from typing import Any

import pytest

from megatron_infifpo.records.records import parse_record
from megatron_infifpo.records.split import to_json

NAN = math.nan
PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
PAIR_SCORES: dict[str, tuple[dict[str, Any], tuple | None, set[str]]] = {
    "ours": ({"score_chosen": 9, "score_rejected": 1.5}, (9.0, 1.5), set()),
    "others'": ({"chosen_score": "9", "rejected_score": 1}, (9.0, 1.0), set()),
    "a list": ({"scores": [2, 1]}, (2.0, 1.0), set()),
    "one alone": ({"score_chosen": 9}, None, {"score_chosen"}),
    "null": ({"score_chosen": 9, "score_rejected": None}, None, {"score_chosen"}),
    "no number": (
        {"score_chosen": 9, "score_rejected": "bad"},
        None,
        {"score_chosen", "score_rejected"},
    ),
    "immense": ({"scores": [1e39, 1]}, None, {"scores"}),
    "infinite": ({"scores": [math.inf, 1]}, None, {"scores"}),
    "of other responses": ({"scores": [1, 2, 3, 4]}, None, {"scores"}),
    "two names": (
        {"score_chosen": 9, "score_rejected": 1, "scores": [2, 1]},
        (9.0, 1.0),
        {"scores"},
    ),
    "the pivot's, too": (
        {
            "pivot_chosen": "It is 2.",
            "score_chosen": 9,
            "score_rejected": 1,
            "score_pivot_chosen": 8,
        },
        (9.0, 1.0, 8.0),
        set(),
    ),
    "not the pivot's": (
        {"pivot_chosen": "It is 2.", "score_chosen": 9, "score_rejected": 1},
        (9.0, 1.0, NAN),
        set(),
    ),
    "cut": ({"finish_reasons": ["length", "stop"]}, None, set()),
    "reasons of others": ({"finish_reasons": ["length"] * 4}, None, {"finish_reasons"}),
}


@pytest.mark.parametrize("name", PAIR_SCORES)
def test_a_pair_keeps_its_scores(name):
    fields, scores, unused = PAIR_SCORES[name]
    found, ignored = parse_record(PAIR | fields, default_id="d")
    assert repr(found.scores) == repr(scores) and ignored == unused and not found.listed
    assert found.cut == ((True, False) if name == "cut" else ())
    assert parse_record(to_json(found), default_id="x") == (found, set())
