"""The chain of a run's rounds: which data it may go on with, and what is written down."""

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.training.rounds import Round, began, continued, read_rounds


def data(records: str, *, weights: str = "w", sources: tuple[str, ...] = ("qwen",)) -> dict:
    """An identity of data: records, and what is stored of the models for them."""
    stored = {"weights_sha256": weights, "dtype": "bfloat16", "logprobs_sha256": f"of {records}"}
    return {
        "records_sha256": records,
        "tokens_sha256": f"tokens of {records}",
        "scores_sha256": f"scores of {records}",
        "chat_template_sha256": "template",
        "initial": stored | {"weights_sha256": "pivot"},
        "sources": {name: stored | {"takes_part_in": len(records)} for name in sources},
    }


FIRST, SECOND = Round(0, data("a"), {}), Round(4, data("bb"), {})
BOTH = [FIRST, SECOND]


def now(step: int, records: str, **how) -> Round:
    return Round(step, data(records, **how), {})


def test_goes_on():
    for flags in ({}, {"next_round": True}, {"finished": True}):
        assert continued([FIRST], now(2, "a"), **flags) == [FIRST]
        assert continued(BOTH, now(6, "bb"), **flags) == BOTH
        assert continued(BOTH, now(4, "bb"), **flags) == BOTH


@pytest.mark.parametrize(
    "before, step, records, expected",
    [
        ([FIRST], 2, "a", 0),
        (BOTH, 6, "bb", 4),
        (BOTH, 4, "bb", 4),
        (BOTH, 8, "c", 8),
        (BOTH, 2, "a", 0),  # gone back
        (BOTH, 6, "a", 6),  # of an earlier round, by --allow-changed-run
    ],
)
def test_where_a_round_began(before, step, records, expected):
    assert began(before, data(records), step) == expected
    rounds = continued(before, now(step, records), next_round=True, changed=expected == step != 8)
    assert rounds[-1].iteration == expected


def test_a_new_round():
    third = now(8, "c")
    assert continued(BOTH, third, next_round=True) == [*BOTH, third]
    assert continued(BOTH, third, changed=True) == [*BOTH, third]
    with pytest.raises(UserError, match="records_sha256 is 'c', but was 'bb'.*--next-round"):
        continued(BOTH, third)
    with pytest.raises(UserError, match="begins a round at step 8, where the run ends"):
        continued(BOTH, third, next_round=True, finished=True)


def test_a_round_without_steps_gives_way():
    """Killed before its first checkpoint, and sampled again."""
    again = now(4, "c")
    assert continued(BOTH, again, next_round=True) == [FIRST, again]


def test_back_to_an_earlier_checkpoint():
    """What was begun after it is gone: its number was written into the tracker by hand."""
    assert continued(BOTH, now(2, "a")) == [FIRST]
    other = now(3, "c")
    assert continued(BOTH, other, next_round=True) == [FIRST, other]


@pytest.mark.parametrize("step", [4, 6])
def test_stale_data(step):
    """Also where the round after it has no steps yet; nothing happens where none are left."""
    for next_round in (False, True):
        with pytest.raises(UserError, match="data of round 1, and the run is in round 2 since st"):
            continued(BOTH, now(step, "a"), next_round=next_round)
        assert continued(BOTH, now(step, "a"), next_round=next_round, finished=True) == BOTH
    accepted = continued(BOTH, now(6, "a"), changed=True)
    assert accepted == [*BOTH, now(6, "a")]


@pytest.mark.parametrize(
    "how, said",
    [
        ({"weights": "v"}, r"sources\.qwen\.weights_sha256 is 'v', but was 'w'"),
        ({"sources": ("qwen", "phi")}, r"sources\.phi is there, but was missing"),
        ({"sources": ("phi",)}, r"sources\.qwen is missing, but was there"),
    ],
)
def test_references_stay(how, said):
    with pytest.raises(UserError, match=f"same references, but .*data\\.{said}"):
        continued(BOTH, now(8, "c", **how), next_round=True)


def test_a_file_of_an_older_version():
    content = {"identity": {"data": {"x": 1}}, "attempts": [{"files": {"preference_data": "a"}}]}
    assert read_rounds(content) == [Round(0, {"x": 1}, {"preference_data": "a"})]
    with pytest.raises(UserError, match="rounds"):
        read_rounds(content | {"rounds": [{"iteration": 0}]})
