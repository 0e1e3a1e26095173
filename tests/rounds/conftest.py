"""A job of rounds whose commands are stand-ins."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.rounds.job import RoundsJob

LABEL = {"label": "--program judge.py:score"}


@pytest.fixture
def make_job(tmp_path, monkeypatch):
    """A job of three rounds of four prompts in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    with (tmp_path / "prompts.jsonl").open("w") as file:
        for i in range(10):
            domain = "code" if i % 5 == 0 else "general"
            file.write(json.dumps({"id": f"p{i}", "domain": domain, "prompt": f"say {i}"}) + "\n")
    (tmp_path / "sources.yaml").write_text(
        "initial: {logprobs: elsewhere, weight: 0.5}\nsources:\n"
        "  - {name: one, logprobs: x/one, weight: 0.3,\n"
        "     score: {model: one, backend: transformers}}\n"
        "  - {name: two, logprobs: x/two, weight: 0.2, domains: [code, law],\n"
        "     score: {model: two, tensor-model-parallel-size: 4}}\n"
    )

    def make(**more: Any) -> RoundsJob:
        given: dict[str, Any] = {
            "output": Path("out"), "pivot": "hf", "prompts": ["prompts.jsonl"], "rounds": 3,
            "method": "fuserlhf", "steps": 5, "round_prompts": 4, "count": 3,
            "sources": "sources.yaml", "options": LABEL,
        }  # fmt: skip
        return RoundsJob(**given | more)

    return make
