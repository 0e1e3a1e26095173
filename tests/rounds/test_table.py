"""What is said of a round: rewards of all that was sampled, each thing judged once."""

import json
from pathlib import Path

import pytest

from megatron_infifpo.responses.choosing import choose_list, choose_pair
from megatron_infifpo.responses.judging import LeftOut, label
from megatron_infifpo.responses.labels import read_responses
from megatron_infifpo.rounds.stages import RoundFolder
from megatron_infifpo.rounds.table import sampled

PAIRS = {"sources": None, "method": "dpo"}


def call(name: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "arguments": {}}}]


@pytest.mark.parametrize(
    ("given", "keep_cut", "reward"),
    [({}, True, (3 + 7 + 7 + 1 + 1) / 5), (PAIRS, False, (3 + 7 + 7 + 1) / 4)],
)
def test_rewards(make_job, given, keep_cut, reward):
    """Calls without text differ; what is equal counts as often as it was sampled."""
    here = RoundFolder(job := make_job(**given), 0)
    here.path.mkdir(parents=True)
    row = {
        "id": "a", "prompt": "go", "model": "policy",
        "responses": ["", "", "", "words", " words"],
        "finish_reasons": ["tool_calls", "tool_calls", "tool_calls", "stop", "length"],
        "tool_calls": [call("left"), call("right"), call("right"), None, None],
    }  # fmt: skip
    here.responses.write_text(json.dumps(row) + "\n")
    scores = {"left": 3.0, "right": 7.0}

    def judge(prompt, answers):
        return [
            scores[a.tool_calls[0]["function"]["name"]] if a.tool_calls else 1.0 for a in answers
        ]

    def choose(responses, found):
        if keep_cut:
            return choose_list(responses, found, 5, 0.0)
        return choose_pair(responses, found, None)

    responses = read_responses([here.responses], keep_cut=keep_cut).values()
    cache, dropped = Path(f"{here.records}.scores"), LeftOut()
    records = list(label(responses, judge, "judge", cache, choose, dropped))
    assert len(records) == 1 and not dropped
    found = sampled(job, here)
    assert found == {"prompts": 1, "responses": 5, "cut": 1, "reward": reward}


def test_what_is_no_reward(make_job):
    """A judge's function may return anything."""
    here = RoundFolder(job := make_job(), 0)
    here.path.mkdir(parents=True)
    texts = ["a", "b", "c", "d"]
    row = {"id": "a", "prompt": "go", "responses": texts, "finish_reasons": ["stop"] * 4}
    here.responses.write_text(json.dumps(row) + "\n")
    judged = {"id": "a", "responses": texts, "scores": [None, float("nan"), "None", 0.5]}
    Path(f"{here.records}.scores").write_text(json.dumps(judged) + "\n")
    assert sampled(job, here)["reward"] == 0.5
