"""Scoring jobs as Python makes them: what is refused, and the same bytes as by the command."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.scoring.job import BACKENDS, ScoringJob
from megatron_infifpo.tokens.options import TokenizerOptions
from support.tools import run_tool

FILES = (".bin", ".idx", "_sums.npy", "_counts.npy", ".json")
PLAIN: dict[str, Any] = {"backend": "megatron", "model": "m", "input": ["r.jsonl"], "output": "o"}
REMOTE: dict[str, Any] = {"tokenizer_options": TokenizerOptions(trust_remote_code=True)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backend": "onnx"}, "--backend is 'onnx', expected one of megatron, transformers, vllm"),
        ({"on_bad_record": "mend"}, "--on-bad-record is 'mend', expected one of error, skip"),
        ({"over_context": "drop"}, "--over-context is 'drop', expected one of mask, cut"),
        (
            {"micro_batch_tokens": 0},
            "--micro-batch-tokens is 0, expected a whole number of at least 1",
        ),
        ({"shard_records": 2.5}, "--shard-records is 2.5, expected a whole number"),
        ({"context_length": -1}, "--context-length is -1, expected a whole number"),
        ({"tensor_model_parallel_size": True}, "--tensor-model-parallel-size is True"),
        ({"input": "r.jsonl"}, "--input is 'r.jsonl', expected a list of files"),
        ({"input": []}, r"--input is \[\], expected a list of files"),
        (REMOTE, "--trust-remote-code has no effect with --backend megatron"),
        (
            {"backend": "transformers", "pipeline_model_parallel_size": 2},
            "--backend transformers has no pipeline parallelism: use megatron",
        ),
    ],
)
def test_jobs_that_cannot_be(change, said):
    ScoringJob(**PLAIN)
    with pytest.raises(UserError, match=said):
        ScoringJob(**PLAIN | change)


def test_the_command_refuses_the_same():
    argv = ["--backend", "megatron", "--model", "m", "--input", "r.jsonl", "--output", "o"]
    with pytest.raises(UserError, match="--trust-remote-code has no effect"):
        run_tool("score_source", [*argv, "--trust-remote-code"])
    argv[1] = "transformers"
    with pytest.raises(UserError, match="no pipeline parallelism"):
        run_tool("score_source", [*argv, "--pipeline-model-parallel-size", "2"])


def test_options_of_a_tokenizer():
    with pytest.raises(UserError, match="--score is 'first', expected one of last, all"):
        TokenizerOptions(score="first")
    with pytest.raises(UserError, match="--score-reasoning is True"):
        TokenizerOptions(**dict[str, Any](score_reasoning=True))


def test_a_job_is_frozen():
    job: Any = ScoringJob(**PLAIN)
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.bf16 = True


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_are_given_what_they_take(monkeypatch, name):
    given: dict[str, Any] = {}

    def load(_: str, **options: Any) -> Any:
        return given | options

    backend = dataclasses.replace(BACKENDS[name], load=load)
    monkeypatch.setitem(BACKENDS, name, backend)
    more = {"pipeline_model_parallel_size": 4} if name == "megatron" else REMOTE
    job = ScoringJob(**PLAIN | {"backend": name, "tensor_model_parallel_size": 2} | more)
    expected = {"tensor_parallel": 2, "bf16": False}
    last: dict[str, Any] = {"trust_remote_code": True}
    if name == "megatron":
        last = {"pipeline_parallel": 4, "context_parallel": 1}
        last |= {"expert_parallel": 1, "expert_tensor_parallel": 1}
    if name == "vllm":
        last |= {"context_length": 99, "top_k": None, "tokenizer": None}
        last |= {"server": None, "server_model": None}
    assert job.load_model(99) == expected | last


def test_the_same_bytes_by_python_and_by_the_command(setup, ranks, tmp_path):
    """Two ranks and several shards, records of a domain masked, responses cut."""
    more = {"domains": ["code"], "context_length": 40, "over_context": "cut", "shard_records": 4}
    job = {"backend": "megatron", "model": str(setup.hf), "input": [str(setup.records)]}
    outputs = [tmp_path / name for name in ("python", "command")]
    ranks(2, "support.scoring:score_from_python", job | more | {"output": str(outputs[0])})
    argv = ["--backend", "megatron", "--model", str(setup.hf), "--input", str(setup.records)]
    argv += ["--domains", "code", "--context-length", "40", "--over-context", "cut"]
    argv += ["--shard-records", "4", "--output", str(outputs[1])]
    ranks(2, "support.scoring:score", argv)
    for suffix in FILES:
        assert content(outputs[0], suffix) == content(outputs[1], suffix), suffix


def content(prefix: Path, suffix: str) -> bytes:
    return Path(f"{prefix}{suffix}").read_bytes()
