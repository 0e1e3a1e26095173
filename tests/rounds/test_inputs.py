"""What later stages read is looked for before the first one runs; what a round is."""

from pathlib import Path

import pytest

from megatron_infifpo.commands import rounds
from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.ends import StageError
from megatron_infifpo.rounds.inputs import check, check_inputs


@pytest.fixture
def given(make_job):
    """What is there, all of it."""
    make_job()
    Path("source").mkdir()
    Path("source/latest_checkpointed_iteration.txt").touch()
    return {"pivot": "hf", "file": "sources.yaml", "sources": {"one": "source"}}


def test_all_is_there(given):
    check(given | {"program": "judge.py:score"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pivot": "none"}, "--pivot none: no such folder"),
        ({"pivot": "source"}, "--pivot source has no config.json"),
        ({"sources": {"one": "none"}}, "sources.yaml: source 'one': none: no such folder"),
        ({"program": "judge.py:other"}, "judge.py has no function 'other'"),
        ({"reward_model": "none"}, "none is not a folder"),
    ],
)
def test_what_is_missing(given, change, message):
    with pytest.raises(UserError, match=message):
        check(given | change)


def test_that_cannot_be_asked(make_job, capsys):
    Path("python.sh").write_text("#!/bin/sh\necho no such container >&2\nexit 3\n")
    Path("python.sh").chmod(0o755)
    with pytest.raises(StageError, match="could not be checked: ended with 3"):
        check_inputs(make_job(python="./python.sh"), {"PATH": "/bin"})
    assert "no such container" in capsys.readouterr().err


def test_a_round_of_unknown_steps(make_job):
    assert rounds.a_round(make_job(), None) == "a round is 5 steps on 4 prompts"
