"""What an engine samples from is the model's softmax; OUTPUT.measured keeps its log-probs."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_infifpo.commands.main import run_command
from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.responses.engines import EngineOptions, Sampling, TransformersEngine
from megatron_infifpo.responses.logprob_check import Scorer
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.tokens.measured import read_measured
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.talkers import answer, choice, save_talker


def test_it_has_the_models_log_probs(sample, talker, tmp_path):
    """Of the prompts' own ids, at temperature 1 whatever the job samples at; scoring agrees."""
    lines = sample("--check", "3", "--temperature", "0.3", "--as", "pivot")
    found = read_measured(tmp_path / "out.jsonl.measured")
    chat = ChatTokenizer.from_pretrained(talker)
    network = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    scorer = Scorer(network)
    assert [one.id for one in found] == ["p0", "p1", "p2"]
    for one, line in zip(found, lines, strict=False):
        assert one.model == line["model"] == "talker"
        assert (one.weights_sha256, one.weights_dtype) == (weights_fingerprint(talker), "float32")
        assert one.prompt_ids.tolist() == chat.prompt_ids([(line["prompt"], line["id"])])[0]
        ids = torch.tensor([*one.prompt_ids, *one.response_ids])
        with torch.no_grad():
            logprobs = network(ids[None]).logits[0].log_softmax(-1)
        before = torch.arange(len(one.prompt_ids), len(ids)) - 1
        expected = logprobs[before, ids[before + 1]].numpy()
        np.testing.assert_allclose(one.logprobs, expected, atol=1e-4)
        assert expected.std() > 0.1, "else any number would do"
        scored = scorer(one.prompt_ids.tolist(), one.response_ids.tolist()).numpy()
        np.testing.assert_allclose(one.logprobs, scored, atol=1e-4)


def test_nothing_else_shapes_the_distribution(tmp_path, monkeypatch):
    """At temperature 1 the tokens come as the softmax has them, whatever the model's files say."""
    folder = save_talker(tmp_path / "talker")
    settings = {"do_sample": True, "top_k": 3, "top_p": 0.5, "temperature": 0.3, "min_p": 0.1}
    settings |= {"repetition_penalty": 4.0, "min_new_tokens": 1, "typical_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    chat = ChatTokenizer.from_pretrained(folder)
    how = Sampling(temperature=1.0, max_tokens=1)
    engine = TransformersEngine(str(folder), chat, how, EngineOptions(batch=1))
    prompt = Prompt("p", "general", ({"role": "user", "content": "the sun and the sun"},), {})
    with torch.no_grad():
        engine.network.lm_head.weight *= 3  # so that tokens are as different as a trained model's
    opened, count = engine.turns.open(prompt), 3000
    ids: list[int] = []
    monkeypatch.setattr(engine.turns, "response", lambda row, _: ids.append(row[0]))
    engine.sample([prompt], [count], 0)
    with torch.no_grad():
        expected = count * engine.network(torch.tensor([opened.ids])).logits[0, -1].softmax(-1)
    found = torch.bincount(torch.tensor(ids), minlength=len(expected))
    often = expected >= 5
    groups = torch.stack([found, expected])
    found, expected = torch.cat([groups[:, often], groups[:, ~often].sum(1, keepdim=True)], dim=1)
    chi_square, degrees = float(((found - expected) ** 2 / expected).sum()), len(found) - 1
    assert degrees > 20 and abs(chi_square - degrees) < 3 * (2 * degrees) ** 0.5


def test_every_part_writes_the_same(sample, tmp_path):
    """Before it samples; a job that goes on writes it again, and --check 0 leaves it alone."""
    path = tmp_path / "parts.jsonl.measured"
    written = []
    for flags in (["--part", "1/2"], ["--part", "1/2"], ["--part", "0/2"]):
        sample(*flags, output="parts.jsonl")
        written.append(path.read_bytes())
        path.unlink()
    assert len(set(written)) == 1
    path.write_bytes(b"kept")
    (tmp_path / "parts.jsonl").unlink()
    sample("--check", "0", output="parts.jsonl")
    assert path.read_bytes() == b"kept"
    assert not list(tmp_path.glob("*.partial"))


def test_it_is_there_before_the_responses(sample, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_infifpo.responses.sample.run_job", stop)
    with pytest.raises(KeyboardInterrupt):
        sample()
    assert len(read_measured(tmp_path / "out.jsonl.measured")) == 4


def test_check_only(sample, prompts, talker, tmp_path, monkeypatch):
    """With --output it is all that is written, without it nothing is."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    argv = ["--model", str(talker), "--input", str(prompts), "--check-only"]
    run_command("sample", argv)
    assert set(tmp_path.iterdir()) == before
    assert sample("--check-only", output="new/out.jsonl") == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl.measured"]


def test_nothing_is_measured(sample, server, talker, tmp_path):
    """Without a check, and of a server, which gives texts of tokens but no ids."""
    sample("--check", "0")
    logprobs = {"content": [{"token": "x", "logprob": -1.0}]}
    server.mood = lambda question: answer(*[{**choice("x"), "logprobs": logprobs}] * question["n"])
    sample("--engine", "server", "--server", server.url, "--check-model", str(talker),
           output="server.jsonl")  # fmt: skip
    assert any(question.get("logprobs") for question in server.asked)
    assert not list(tmp_path.glob("*.measured"))
