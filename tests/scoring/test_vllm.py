"""Scoring with vLLM, by stand-ins with its interface: transformers' numbers, or a sentence."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.scoring import vllm_backend
from megatron_infifpo.scoring.job import ScoringJob
from support import tiny, vllms
from support.talkers import ChatServer
from support.tools import run_command

CONTEXT = 512
K = 5
SPAWN = "VLLM_WORKER_MULTIPROCESSING_METHOD"
DATA = (".bin", ".idx", "_sums.npy", "_counts.npy")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """More ids than its tokenizer has, and initialised so that rounding is not amplified."""
    folder = tmp_path_factory.mktemp("model") / "m"
    return tiny.save_model(folder, "qwen2", vocab_size=307, initializer_range=0.1)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """Eleven records, of half of which only the end is scored."""
    return tiny.add_turns(tiny.write_records(tmp_path_factory.mktemp("records") / "r.jsonl", 11))


@pytest.fixture(scope="module")
def score(model, records):
    """Score the records with some backend; returns the prefix."""

    def run(output: Path, backend: str, *more: str) -> Path:
        words = ["--backend", backend, "--model", str(model), "--input", str(records)]
        words += ["--output", str(output), "--shard-records", "3", "--micro-batch-tokens", "300"]
        run_command("score", *words, "--name", "m", *more)
        return output

    return run


@pytest.fixture(scope="module")
def expected(score, tmp_path_factory) -> LogprobStore:
    """As transformers has them, which scores texts as long as vLLM's can be."""
    more = ["--top-k", str(K), "--context-length", str(CONTEXT - 1)]
    return LogprobStore(score(tmp_path_factory.mktemp("expected") / "o", "transformers", *more))


@pytest.fixture
def offline(monkeypatch):
    """A vLLM that is installed; what was loaded, and what was asked."""
    monkeypatch.setenv(SPAWN, "")  # so that it is as before in the end
    monkeypatch.delenv(SPAWN)
    loaded: list[dict[str, Any]] = []
    asked: list[tuple[int, Any]] = []
    monkeypatch.setitem(sys.modules, "vllm", vllms.module(loaded, asked))
    return loaded, asked


@pytest.fixture
def server(model, monkeypatch):
    """A server of the model that says nothing of ids, as one that stands before it may be."""
    wait = time.sleep
    monkeypatch.setattr("time.sleep", lambda seconds: wait(min(seconds, 0.01)))
    made, network = ChatServer(), vllms.Network(model, CONTEXT)
    made.pages = vllms.pages("served", most=CONTEXT)
    made.mood = lambda question: vllms.served(network, question, says_ids=False)
    yield made
    made.close()


def compare(found: LogprobStore, expected: LogprobStore, *, top: bool) -> None:
    """Log-probs within 1e-5; the most probable ids the same, where they are not as probable."""
    assert (found.token_counts == expected.token_counts).all() and not found.masked_records.any()
    for i in range(len(found)):
        for r in range(len(found.responses)):
            np.testing.assert_allclose(found.logprobs(i, r), expected.logprobs(i, r), atol=1e-5)
            if top:
                a, b = found.top(i, r), expected.top(i, r)
                np.testing.assert_allclose(a.logps, b.logps, atol=2e-3)  # float16
                assert (a.ids == b.ids).mean() > 0.99


@pytest.mark.parametrize("top", [False, True])
def test_offline(score, offline, expected, tmp_path, capsys, top):
    more = ["--top-k", str(K)] if top else []
    found = LogprobStore(score(tmp_path / "o", "vllm", *more))
    compare(found, expected, top=top)
    assert found.manifest["backend"] == "vllm" and found.manifest["vllm_version"] == "0.11.0"
    assert found.manifest["context_length"] == CONTEXT - 1
    assert "log-probs of vllm and of transformers:" in (said := capsys.readouterr().out)
    assert "tokens of 4 records differ by" in said
    ((options,), asked) = offline
    assert (options["dtype"], options["max_model_len"]) == ("float32", CONTEXT)
    assert os.environ[SPAWN] == "spawn"
    assert options["max_logprobs"] == 20 and options["enable_prefix_caching"] is False
    how = {(p.prompt_logprobs, p.max_tokens, p.temperature, p.detokenize) for _, p in asked}
    assert how == {(0, 1, 1.0, False), (K if top else 0, 1, 1.0, False)}
    asked.clear()
    score(tmp_path / "o", "vllm", *more)
    assert not asked and "is complete already" in capsys.readouterr().out


def test_many_most_probable_ones(score, offline, expected, tmp_path):
    """More than vLLM gives unless it is told so."""
    score(tmp_path / "o", "vllm", "--top-k", "24", "--compare-records", "0")
    many, few = LogprobStore(tmp_path / "o").top(0, 0).logps, expected.top(0, 0).logps
    np.testing.assert_allclose(many[:, :K], few[:, :K], atol=2e-3)
    falling = many[:, :24].astype(np.float64)  # behind them lies the mass of all others
    assert (np.diff(falling, axis=1) <= 0).all() and (np.exp(falling).sum(axis=1) < 1).all()
    assert offline[0][0]["max_logprobs"] == 24


@pytest.mark.parametrize("call", [1, 10**6])
def test_calls_of_any_size(score, offline, expected, tmp_path, monkeypatch, call):
    monkeypatch.setattr(vllm_backend, "CALL_TOKENS", call)
    score(tmp_path / "o", "vllm", "--compare-records", "0", "--max-row-tokens", "60")
    compare(LogprobStore(tmp_path / "o"), expected, top=False)
    counts = [count for count, _ in offline[1]]
    assert len(counts) == 4 if call > 1 else max(counts) < 9


@pytest.mark.parametrize("says_ids", [False, True])
def test_server(score, server, model, expected, tmp_path, says_ids):
    network = vllms.Network(model, CONTEXT)

    def mood(question: dict[str, Any]) -> tuple[int, Any]:
        """Every fifth time it is overloaded."""
        if len(server.asked) % 5 == 0:
            return 503, b"later"
        return vllms.served(network, question, says_ids=says_ids)

    server.mood = mood
    more = ["--server", server.url, "--top-k", str(K), "--server-requests", "3"]
    found = LogprobStore(score(tmp_path / "o", "vllm", *more))
    compare(found, expected, top=True)
    manifest = found.manifest
    assert (manifest["server_model"], manifest["vllm_version"]) == ("served", "0.11.0")
    assert manifest["device"] == "a server's"
    one = server.asked[-1]
    assert (one["model"], one["prompt_logprobs"], one["max_tokens"]) == ("served", K, 1)
    assert (one["temperature"], one["repetition_penalty"]) == (1.0, 1.0)


def test_interrupted(score, server, offline, tmp_path):
    """Finished shards are kept, only what is missing is asked for, and the bytes are the same."""
    more = ["--server", server.url, "--compare-records", "0", "--server-requests", "1"]
    score(tmp_path / "whole", "vllm", *more)
    texts, working = len(server.asked), server.mood
    server.asked.clear()
    server.mood = lambda q: working(q) if len(server.asked) <= texts // 2 else (500, b"down")
    with pytest.raises(UserError, match=r"does not answer record 'r-\d+': HTTP Error 500"):
        score(tmp_path / "o", "vllm", *more)
    shards = list((tmp_path / "o.shards").glob("[0-9]*.npz"))
    assert 0 < len(shards) < 4
    with pytest.raises(UserError, match="holds shards of another job: its backend is 'vllm'"):
        score(tmp_path / "o", "transformers", "--context-length", str(CONTEXT - 1))
    with pytest.raises(UserError, match="holds shards of another job: its device is"):
        score(tmp_path / "o", "vllm")
    server.mood = working
    server.asked.clear()
    score(tmp_path / "o", "vllm", *more)
    assert 0 < len(server.asked) < texts
    for suffix in DATA:
        a, b = (Path(f"{tmp_path / name}{suffix}").read_bytes() for name in ("whole", "o"))
        assert a == b, suffix


def spoilt(change: Any) -> Any:
    """A mood of a server of which `change` spoils what a choice says."""

    def wrap(working: Any) -> Any:
        def mood(question: dict[str, Any]) -> tuple[int, Any]:
            status, body = working(question)
            change(body["choices"][0])
            return status, body

        return mood

    return wrap


def begin_otherwise(working: Any) -> Any:
    """A server that puts a token before every prompt, as a beginning of the text."""
    return lambda question: working({**question, "prompt": [2, *question["prompt"]]})


def read_otherwise(working: Any) -> Any:
    """A server that reads other ids, as many as were sent."""
    return lambda q: working({**q, "prompt": [(i + 1) % 300 for i in q["prompt"]]})


def slow(working: Any) -> Any:
    """A server that needs longer than its timeout; `time.sleep` is short here."""
    return lambda question: (threading.Event().wait(0.3), working(question))[1]


def last(choice: dict[str, Any]) -> dict[str, Any]:
    """Log-probs at the last position, the end of the turn."""
    return choice["prompt_logprobs"][-1]


@pytest.mark.parametrize(
    ("wrong", "more", "said"),
    [
        (begin_otherwise, [], r"of \d+ tokens of record 'r-0', which has \d+: it has read other"),
        (read_otherwise, [], r"has read other token ids than were sent for record 'r-0'"),
        (read_otherwise, ["--top-k", "5"], "has read other token ids than were sent"),
        (
            spoilt(lambda choice: choice.update(prompt_token_ids=[1, 2])),
            [],
            "has read other token ids than were sent for record 'r-0': 1, 2; expected a model",
        ),
        (
            spoilt(lambda choice: choice.update(prompt_logprobs=None)),
            [],
            "gives no prompt_logprobs of record 'r-0'",
        ),
        (
            spoilt(lambda choice: choice["prompt_logprobs"].__setitem__(1, None)),
            [],
            "no log-prob of token 1 of record 'r-0': .*--no-enable-prefix-caching",
        ),
        (
            spoilt(lambda choice: [one.update(logprob=7.5) for one in last(choice).values()]),
            [],
            r"gives token \d+ of record 'r-0' the log-prob 7.5, .*--logprobs-mode",
        ),
        (
            spoilt(lambda choice: [one.update(logprob=-9999) for one in last(choice).values()]),
            [],
            "the log-prob -9999.0, expected a number",
        ),
        (
            spoilt(lambda choice: last(choice).popitem() and last(choice).popitem()),
            ["--top-k", "5"],
            "log-probs of a token of record 'r-0', expected the 5 most probable",
        ),
        (
            lambda working: lambda question: (200, {"choices": []}),
            ["--server-retries", "0"],
            "does not answer record 'r-0'",
        ),
        (None, ["--top-k", "40"], r"refuses record 'r-0': .*max allowed: 20.*--max-logprobs 40\)"),
        (None, ["--server-model", "other"], "has no model other, only served: --server-model"),
        (
            slow,
            ["--server-timeout", "0.1", "--server-retries", "1"],
            "/completions does not answer record 'r-0': timed out; finished shards are kept",
        ),
    ],
)
def test_servers_that_are_wrong(score, server, tmp_path, wrong, more, said):
    server.mood = wrong(server.mood) if wrong else server.mood
    with pytest.raises(UserError, match=said):
        score(
            tmp_path / "o", "vllm", "--server", server.url, "--compare-records", "0",
            "--server-requests", "1", *more,
        )  # fmt: skip


def test_servers_of_other_sizes(score, server, tmp_path):
    server.pages = vllms.pages("a", "b", most=100)
    with pytest.raises(UserError, match="has the models a, b: choose --server-model"):
        score(tmp_path / "o", "vllm", "--server", server.url)
    said = "takes 100 tokens .*--max-model-len 512, or give --context-length 99"
    with pytest.raises(UserError, match=said):
        score(tmp_path / "o", "vllm", "--server", server.url, "--server-model", "b")
    del server.pages["/version"]
    more = ["--server-model", "b", "--context-length", "99"]
    score(tmp_path / "o", "vllm", "--server", server.url, *more)
    assert LogprobStore(tmp_path / "o").manifest["vllm_version"] is None


def test_a_server_that_is_down(score, server, tmp_path):
    server.close()
    with pytest.raises(UserError, match="/models does not answer which models it has: .*refused"):
        score(tmp_path / "o", "vllm", "--server", server.url)


def test_a_server_with_other_weights(score, server, tmp_path, capsys):
    """Its ids are right: only the comparison finds it."""
    other = tiny.save_model(tmp_path / "other", "qwen2", vocab_size=307, seed=9)
    network = vllms.Network(other, CONTEXT)
    server.mood = lambda question: vllms.served(network, question, says_ids=True)
    said = r"tokens of 2 records differ by \d.* most of all record 'r-[01]'. Expected the weights"
    with pytest.raises(UserError, match=said):
        score(tmp_path / "o", "vllm", "--server", server.url, "--compare-records", "2")
    score(tmp_path / "o", "vllm", "--server", server.url, "--compare-records", "0")
    assert "of transformers" not in capsys.readouterr().out


def test_as_long_as_the_model_takes(score, model, offline, tmp_path):
    """vLLM writes a token behind every text: one that fills the context is masked."""
    line = {"id": "long", "domain": "d", "prompt": "a", "chosen": "b " * CONTEXT, "rejected": "c"}
    path = tmp_path / "long.jsonl"
    path.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'id': 'short', 'chosen': 'b'})}\n")
    score(tmp_path / "o", "vllm", "--input", str(path), "--over-context", "cut")
    store = LogprobStore(tmp_path / "o")
    assert store.note(0) == "responses cut to the context of 511 tokens"
    with pytest.raises(UserError, match="takes 511 tokens .max_position_embeddings less 1, which"):
        score(tmp_path / "p", "vllm", "--context-length", "512")


def test_missing(score, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="--backend vllm needs vLLM: install it, or choose"):
        score(tmp_path / "o", "vllm")


def test_one_process(score, offline, tmp_path, monkeypatch):
    score(tmp_path / "o", "vllm", "--tensor-model-parallel-size", "4", "--bf16")
    assert offline[0][0]["tensor_parallel_size"] == 4 and offline[0][0]["dtype"] == "bfloat16"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="is one process, and there are 2: run the command without"):
        score(tmp_path / "p", "vllm")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backend", "transformers", "--server", "http://a"], "--server has no effect with --ba"),
        (["--backend", "megatron", "--compare-records", "2"], "--compare-records has no effect"),
        (["--backend", "vllm", "--server-model", "m"], "--server-model has no effect without"),
        (["--backend", "vllm", "--server", "a:8000"], "--server is a:8000, expected such as http"),
        (
            ["--backend", "vllm", "--server", "http://a", "--tensor-model-parallel-size", "2"],
            "--tensor-model-parallel-size has no effect with --server, which has the model",
        ),
        (["--backend", "vllm", "--pipeline-model-parallel-size", "2"], "no pipeline parallelism"),
    ],
)
def test_options_without_effect(words, said):
    with pytest.raises(UserError, match=said):
        run_command("score", *words, "--model", "m", "--input", "r.jsonl", "--output", "o")
    with pytest.raises(UserError, match="--compare-records is -1"):
        ScoringJob(backend="vllm", model="m", input=["r"], output="o", compare_records=-1)
