"""Fixtures of tests of sampling: one tiny model, one server, and the tool run in-process."""

import json

import pytest

from megatron_infifpo.commands.main import run_command
from support.talkers import ChatServer, save_talker


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    return save_talker(tmp_path_factory.mktemp("sampled") / "talker")


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
def sample(prompts, tmp_path, talker):
    """Run `infifpo sample` on the prompts; the lines that it wrote."""

    def call(*flags: str, output: str = "out.jsonl"):
        argv = ["--model", str(talker), "--input", str(prompts), "--max-tokens", "8"]
        argv += ["--output", str(tmp_path / output), "--shard-prompts", "4", *flags]
        run_command("sample", argv)
        path = tmp_path / output
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return call


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    made = ChatServer()
    yield made
    made.close()
