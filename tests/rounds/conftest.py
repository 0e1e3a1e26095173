"""A job of rounds whose commands are stand-ins."""

from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.rounds.job import RoundsJob
from support.round_stages import write_inputs

LABEL = {"label": "--program judge.py:score"}


@pytest.fixture
def make_job(tmp_path, monkeypatch):
    """A job of three rounds of four prompts in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # nobody cuts the power here
    write_inputs(tmp_path)

    def make(**more: Any) -> RoundsJob:
        given: dict[str, Any] = {
            "output": Path("out"), "pivot": "hf", "prompts": ["prompts.jsonl"], "rounds": 3,
            "method": "fuserlhf", "steps": 5, "round_prompts": 4, "count": 3,
            "sources": "sources.yaml", "options": LABEL,
        }  # fmt: skip
        return RoundsJob(**given | more)

    return make
