"""Sampling by every engine: transformers, a server, and a stand-in for vLLM."""

import http.server
import json
import sys
import threading
import types

import pytest
import tiny
import torch
from workers import load_tool

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.tokenization import ChatTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("sampled") / "tiny", "llama", seed=4)


@pytest.fixture
def prompts(tmp_path):
    records = [
        {"id": f"p{i}", "domain": "code" if i % 2 else "math", "prompt": "two plus " * (i + 1)}
        for i in range(10)
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture
def sample(monkeypatch, prompts, tmp_path, model):
    """Run tools/sample_responses.py on the prompts; the lines that it wrote."""

    def call(*flags: str, output: str = "out.jsonl"):
        argv = ["--model", str(model), "--input", str(prompts), "--max-tokens", "8"]
        argv += ["--output", str(tmp_path / output), "--shard-prompts", "4", *flags]
        monkeypatch.setattr("sys.argv", ["sample_responses.py", *argv])
        load_tool("sample_responses").main()
        path = tmp_path / output
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return call


def test_transformers(sample, tmp_path):
    lines = sample("--as", "pivot")
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(10)]
    assert all(len(line["responses"]) == 8 and line["model"] == "tiny" for line in lines)
    assert not (tmp_path / "out.jsonl.shards").exists()
    again = sample("--as", "pivot", output="again.jsonl")
    assert again == lines, "a seed gives one result"
    assert sample("--as", "pivot", "--seed", "1", output="other.jsonl") != lines


def test_greedy_equals_a_loop(sample, model):
    """Padding on the left and the end of a turn change nothing."""
    from transformers import AutoModelForCausalLM

    chat = ChatTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for line in sample("--temperature", "0", "--count", "1"):
        ids = chat.prompt_ids([(line["prompt"], line["id"])])[0]
        found: list[int] = []
        with torch.no_grad():
            while len(found) < 8:
                token = int(network(torch.tensor([ids + found])).logits[0, -1].argmax())
                if token in (chat.tokenizer.eos_token_id, chat.end_of_turn_ids[-1]):
                    break
                found.append(token)
        expected = chat.tokenizer.decode(found, skip_special_tokens=True)
        assert line["responses"] == [expected]


def test_parts_and_resume(sample, tmp_path):
    """Two parts, one of them stopped after a shard, write what one process writes."""
    whole = sample()
    assert sample("--part", "1/2", output="parts.jsonl") == []
    folder = tmp_path / "parts.jsonl.shards"
    assert [path.name for path in sorted(folder.glob("0*"))] == ["000001.jsonl"]
    with pytest.raises(UserError, match="shards of another job: its temperature is 0.8"):
        sample("--temperature", "0.1", output="parts.jsonl")
    assert sample("--part", "0/2", output="parts.jsonl") == whole


def test_domains(sample):
    assert {line["domain"] for line in sample("--domains", "code")} == {"code"}
    with pytest.raises(UserError, match="no prompt of .* is left"):
        sample("--domains", "law", output="law.jsonl")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as OpenAI's API does; every third time it is overloaded."""

    asked = 0

    def do_POST(self):
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Handler.asked += 1
        code = 503 if Handler.asked % 3 == 0 else 200
        text = question["messages"][-1]["content"].strip().upper()
        choices = [{"message": {"content": f"{text} {i}"}} for i in range(question["n"])]
        body = json.dumps({"choices": choices}).encode()
        if question["model"] == "unknown":
            code, body = 404, b"no such model"
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()


def test_server(sample, server):
    lines = sample("--engine", "server", "--server", server, "--server-requests", "2")
    assert lines[0]["responses"] == [f"TWO PLUS {i}" for i in range(4)]
    assert len(lines) == 10
    with pytest.raises(UserError, match="refuses 'p0': no such model"):
        sample(
            "--engine", "server", "--server", server, "--model", "unknown", output="b.jsonl"
        )  # fmt: skip
    with pytest.raises(UserError, match="go together"):
        sample("--server", server, output="c.jsonl")


def test_vllm(sample, monkeypatch, model):
    """What vLLM is asked for; it is not run here."""
    chat, asked = ChatTokenizer.from_pretrained(model), []

    class LLM:
        def __init__(self, **options):
            asked.append(options)

        def generate(self, prompts, settings):
            asked.append((prompts, settings))
            one = types.SimpleNamespace(text="x")
            return [types.SimpleNamespace(outputs=[one] * settings.n) for _ in prompts]

    stand_in = types.ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams = LLM, lambda **options: types.SimpleNamespace(**options)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    lines = sample("--engine", "vllm", "--tensor-parallel-size", "2", "--bf16")
    assert all(line["responses"] == ["x"] * 4 for line in lines)
    assert asked[0]["tensor_parallel_size"] == 2 and asked[0]["dtype"] == "bfloat16"
    prompts, settings = asked[1]
    assert prompts[0]["prompt_token_ids"] == chat.prompt_ids([(lines[0]["prompt"], "p0")])[0]
    assert settings.temperature == 0.8 and settings.stop_token_ids == [chat.end_of_turn_ids[-1]]


def test_vllm_is_missing(sample):
    with pytest.raises(UserError, match="--engine vllm needs vLLM"):
        sample("--engine", "vllm")
