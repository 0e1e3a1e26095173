"""Sampling by transformers and by a stand-in for vLLM: whole responses, prompts, resume."""

import json
import shutil
import sys
import types
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.engines import EngineOptions, Sampling, TransformersEngine
from megatron_infifpo.responses.logprob_check import compare_with, open_scorer
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.responses.turns import Turns
from megatron_infifpo.tokens.measured import read_measured
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import tiny
from support.talkers import save_talker

OPTIONS = EngineOptions(batch=4)


def ask(text: str, name: str = "p") -> Prompt:
    return Prompt(name, "general", ({"role": "user", "content": text},), {})


def test_whole_responses(sample, tmp_path, capsys):
    """Every prompt has its count, of responses that end by themselves."""
    lines = sample("--as", "pivot", "--check", "0", "--retries", "20")
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(10)]
    assert all(len(line["responses"]) == 8 and line["model"] == "talker" for line in lines)
    assert all(line["finish_reasons"] == ["stop"] * 8 for line in lines)
    assert sum(line.get("left_out", {}).get("cut", 0) for line in lines) > 0
    printed = capsys.readouterr().out
    assert "10 prompts: 5 math, 5 code" in printed
    assert "10 prompts, 80 responses of 80 asked, of talker\n" in printed
    assert "left out while asking: " in printed and "cut at --max-tokens 8" in printed
    assert not (tmp_path / "out.jsonl.shards").exists()
    again = sample("--as", "pivot", "--check", "0", "--retries", "20", output="again.jsonl")
    assert again == lines, "a seed gives one result"
    assert sample("--check", "0", "--seed", "1", output="b.jsonl") != sample(
        "--check", "0", output="c.jsonl"
    )


def test_cut_ones_are_counted(sample, capsys):
    """A model that never ends: nothing is kept, unless that is wanted."""
    lines = sample("--check", "0", "--max-tokens", "1", "--retries", "1", "--count", "2")
    missing = sum(line.get("missing", {}).get("cut", 0) for line in lines)
    kept = [text for line in lines for text in line["responses"]]
    assert len(kept) + sum(sum(line.get("missing", {}).values()) for line in lines) == 20
    assert missing > 0 and all("length" not in line["finish_reasons"] for line in lines)
    printed = capsys.readouterr().out
    assert (
        f"{len(kept)} responses of 20 asked, of talker: {missing} cut at --max-tokens 1" in printed
    )
    assert "fewer than asked for, by prompt: 'p0' 0 of 2" in printed
    lines = sample("--check", "0", "--max-tokens", "1", "--keep-cut", output="cut.jsonl")
    assert any("length" in line["finish_reasons"] for line in lines)


def test_greedy_equals_a_loop(sample, talker, capsys):
    """Padding on the left and the end of a turn change nothing; there is one response."""
    chat = ChatTokenizer.from_pretrained(talker)
    network = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    ended = set()
    for line in sample("--temperature", "0", "--count", "3", "--keep-cut", "--check", "0"):
        ids = chat.prompt_ids([(line["prompt"], line["id"])])[0]
        found: list[int] = []
        finish = "length"
        with torch.no_grad():
            while len(found) < 8:
                token = int(network(torch.tensor([ids + found])).logits[0, -1].argmax())
                if token in (chat.tokenizer.eos_token_id, chat.end_of_turn_ids[-1]):
                    finish = "stop"
                    break
                found.append(token)
        expected = chat.tokenizer.decode(found, skip_special_tokens=True)
        assert line["responses"] == ([expected] if expected.strip() else [])
        assert line["asked"] == 1
        ended.add(finish)
    assert "temperature 0: one response of a prompt" in capsys.readouterr().out


def test_parts_and_resume(sample, tmp_path, talker):
    """Two parts, one of them stopped after a shard, write what one process writes."""
    whole = sample("--check", "0")
    assert sample("--check", "0", "--part", "1/2", output="parts.jsonl") == []
    folder = tmp_path / "parts.jsonl.shards"
    moved = shutil.copytree(talker, tmp_path / "elsewhere" / talker.name)
    assert [path.name for path in sorted(folder.glob("0*"))] == ["000001.jsonl"]
    for flags, message in (
        (["--temperature", "0.1"], "its temperature is 0.8"),
        (["--keep-cut"], "its keep_cut is False"),
        (["--retries", "7"], "its retries is 2"),
        (["--model", str(moved)], f"its folder is '{talker}'"),
    ):
        with pytest.raises(UserError, match=f"shards of another job: {message}"):
            sample("--check", "0", *flags, output="parts.jsonl")
    assert sample("--check", "0", "--part", "0/2", output="parts.jsonl") == whole


def test_other_weights_in_the_same_folder(sample, tmp_path, talker):
    """Shards of one model do not go on with another that has taken its place."""
    folder = shutil.copytree(talker, tmp_path / "policy")
    flags = ["--check", "0", "--model", str(folder), "--part"]
    assert sample(*flags, "1/2", output="parts.jsonl") == []
    (path,) = folder.glob("*.safetensors")
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match="shards of another job: its weights_sha256 is"):
        sample(*flags, "0/2", output="parts.jsonl")


def test_domains(sample):
    lines = sample("--domains", "code", "--check", "0")
    assert {line["domain"] for line in lines} == {"code"}
    with pytest.raises(UserError, match="no prompt of .* is left"):
        sample("--domains", "law", output="law.jsonl")


def test_log_probs_are_those_of_a_loop(talker):
    """What the engine measures: the log-softmax of the model's own logits, token by token."""
    chat = ChatTokenizer.from_pretrained(talker)
    engine = TransformersEngine(str(talker), chat, Sampling(temperature=0.3), OPTIONS)
    network = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()
    prompts = [ask("two plus two"), ask("the sun " * 9, "q"), ask("x", "r")]
    for one in engine.measure(prompts, 6, 3):
        ids = chat.prompt_ids([(one.prompt.messages, "")])[0] + list(one.tokens)
        with torch.no_grad():
            logprobs = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = len(ids) - len(one.tokens)
        expected = [float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids))]
        assert one.logprobs == pytest.approx(expected, abs=1e-4)


def test_a_rope_that_the_check_finds(tmp_path):
    """Angles that change while a text is written: found, and said; not in texts of one side."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4}
    rope |= {"long_factor": [1.0, 2.0, 4.0, 12.0], "original_max_position_embeddings": 32}
    folder = save_talker(
        tmp_path / "rope", rope_parameters=rope, original_max_position_embeddings=32
    )
    chat = ChatTokenizer.from_pretrained(folder)
    engine = TransformersEngine(str(folder), chat, Sampling(), OPTIONS)
    scorer = open_scorer(folder, engine, bf16=False, trust_remote_code=False)

    def check(prompts, seed):
        return compare_with(engine.measure(prompts, 64, seed), chat, scorer)

    found = check([ask("the sun " * 20), ask("x", "q")], 0)
    assert found.by_length and found.agrees(0.01), "one is long, the other ends before the limit"
    crossing = [ask("the sun " * n, f"r{n}") for n in range(6, 12)]
    found = check(crossing, 1)
    assert not found.agrees(0.01)
    assert "rope depends on how long a text is" in found.sentence(0.01, "x")


@pytest.mark.parametrize("marked", [True, False])
def test_reasoning_of_a_model(talker, marked):
    """Special tokens go from the answer, the markers of reasoning before them."""
    chat = ChatTokenizer.from_pretrained(talker)
    if marked:
        chat.template.text += "{# </think> #}"
    turns = TransformersEngine(str(talker), chat, Sampling(), OPTIONS).turns
    text = "<think>\nso</think>\n\nyes<|user|> it is<|end|>no"
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    response = turns.response(ids, turns.open(ask("x")))
    assert response.finish == "stop"
    assert (response.text, response.reasoning) == (
        ("yes it is", "so") if marked else ("<think>\nso</think>\n\nyes it is", None)
    )
    cut = ids[: ids.index(chat.end_of_turn_ids[-1])]
    assert turns.response(cut, turns.open(ask("x"))).finish == "length"


def test_what_the_template_ends_a_reply_with(talker):
    """A line break before the token that ends a turn is the template's, not the answer's."""
    chat = ChatTokenizer.from_pretrained(
        talker, template=tiny.TEMPLATE.replace("'<|end|>'", "'\\n<|end|>'")
    )
    turns = Turns(chat)
    opened = turns.open(ask("x"))
    ids = chat.tokenizer("yes\n\n<|end|>", add_special_tokens=False)["input_ids"]
    assert turns.response(ids, opened).text == "yes\n"
    assert turns.response(ids[:-1], opened).text == "yes\n\n"


def test_an_end_of_turn_that_is_text(tmp_path):
    """Without a token that ends a turn, its text does."""
    folder = save_talker(tmp_path / "text")
    template = tiny.TEMPLATE.replace("<|end|>", "[END]")
    chat = ChatTokenizer.from_pretrained(folder, template=template)
    engine = TransformersEngine(str(folder), chat, Sampling(), OPTIONS)
    assert engine.turns.texts == ["[END]"] and chat.end_of_turn_ids[-1] not in engine.turns.ids
    ids = chat.tokenizer("yes] [END] no", add_special_tokens=False)["input_ids"]
    response = engine.turns.response(ids, engine.turns.open(ask("x")))
    assert (response.text.strip(), response.finish) == ("yes]", "stop")
    assert len(engine.sample([ask("x")], [2], 0)[0]) == 2


def test_a_rope_of_the_batch(tmp_path):
    """A text's numbers do not depend on its neighbours, and a full context is refused."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = save_talker(tmp_path / "rope", rope_parameters=rope, max_position_embeddings=64)
    chat = ChatTokenizer.from_pretrained(folder)
    long, short = ask("the sun and the moon " * 3), ask("x", "q")
    found = []
    for prompts in ([long, short], [short], [long]):
        engine = TransformersEngine(
            str(folder), chat, Sampling(temperature=0, max_tokens=5), OPTIONS
        )
        found.append(engine.sample(prompts, [1] * len(prompts), 0))
    assert found[0] == [found[2][0], found[1][0]]
    with pytest.raises(UserError, match="prompt 'p' has .* tokens, expected fewer than the model"):
        engine.sample([ask("the sun " * 90)], [1], 0)
    engine.turns._skip = True
    (refused,), (response,) = engine.sample([ask("the sun " * 90), short], [1, 1], 0)
    assert refused.fault == "refused" and [response] == found[1][0]


def test_conversations_are_whole(sample, tmp_path, talker):
    """Every earlier turn is in what the model is asked, and id 0 stays."""
    turns = [("user", "My name is Lee."), ("assistant", "Hello Lee."), ("user", "What is my name?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    path = tmp_path / "mt.jsonl"
    path.write_text(json.dumps({"id": 0, "prompt": messages, "chosen": "Lee.", "rejected": "No."}))
    (line,) = sample("--input", str(path), "--check", "0", "--count", "2")
    assert line["id"] == "0" and line["prompt"] == messages


class SamplingParams(types.SimpleNamespace):
    """vLLM's, as its documentation has it: only the names that are used here."""


def stand_in_for_vllm(chat: ChatTokenizer, asked: list) -> types.ModuleType:
    """A vLLM whose every second response is cut: its documented outputs, no model."""
    end = chat.end_of_turn_ids[-1]

    def completion(index: int, settings: SamplingParams):
        ids = chat.tokenizer(f"yes {index}", add_special_tokens=False)["input_ids"]
        cut = index % 2 == 1
        ids = ids if cut else [*ids, end]
        logprobs = [{i: types.SimpleNamespace(logprob=-0.5), 7: types.SimpleNamespace(logprob=-9)}
                    for i in ids]  # fmt: skip
        return types.SimpleNamespace(
            index=index, text="not read", token_ids=tuple(ids),
            logprobs=logprobs if settings.logprobs is not None else None,
            finish_reason="length" if cut else "stop", stop_reason=None,
        )  # fmt: skip

    class LLM:
        def __init__(self, **options):
            asked.append(options)

        def generate(self, prompts, settings):
            asked.append((prompts, settings))
            return [
                types.SimpleNamespace(outputs=[completion(i, one) for i in range(one.n)])
                for one in settings
            ]

    module: Any = types.ModuleType("vllm")
    module.LLM = LLM
    module.SamplingParams = lambda **given: SamplingParams(**{"logprobs": None, **given})
    return module


def test_vllm(sample, monkeypatch, talker, tmp_path, capsys):
    """What vLLM is asked for, and what its answers are taken for; it is not run here."""
    chat = ChatTokenizer.from_pretrained(talker)
    asked: list[Any] = []
    monkeypatch.setitem(sys.modules, "vllm", stand_in_for_vllm(chat, asked))
    lines = sample("--engine", "vllm", "--tensor-parallel-size", "2", "--count", "3")
    assert all(line["responses"] == ["yes 0", "yes 2", "yes 0"] for line in lines)
    assert all(line["left_out"] == {"cut": 1} for line in lines)
    assert "30 responses of 30 asked" in (out := capsys.readouterr()).out
    assert "10 responses repeat another one of their prompt" in out.out
    # Its log-probs (-0.5 each) are not this model's.
    assert "warning: log-probs of the engine" in out.err and "same weights" in out.err
    assert asked[0]["tensor_parallel_size"] == 2 and asked[0]["dtype"] == "float32"
    prompts, settings = asked[2]
    assert prompts[0]["prompt_token_ids"] == chat.prompt_ids([(lines[0]["prompt"], "p0")])[0]
    assert (settings[0].temperature, settings[0].n, settings[0].stop) == (0.8, 3, [])
    assert settings[0].stop_token_ids == [chat.end_of_turn_ids[-1]]
    assert asked[1][1][0].temperature == 1.0 and asked[3][1][0].n == 1
    kept = read_measured(tmp_path / "out.jsonl.measured")
    assert [one.id for one in kept] == ["p0", "p1", "p2", "p3"]
    assert kept[1].prompt_ids.tolist() == prompts[1]["prompt_token_ids"]
    assert chat.tokenizer.decode(kept[1].response_ids[:-1]) == "yes 0"
    assert set(kept[1].logprobs.tolist()) == {-0.5}


def test_vllm_is_missing(sample):
    with pytest.raises(UserError, match="--engine vllm needs vLLM"):
        sample("--engine", "vllm")
