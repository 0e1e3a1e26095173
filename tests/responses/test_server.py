"""Sampling from a server: whole responses in every mood, or the count of what is missing."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_infifpo.errors import UserError
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.chats import SUM
from support.talkers import answer, choice


@pytest.fixture
def ask(sample, server):
    """Sample from the server in a mood."""

    def call(mood, *flags: str, output: str = "out.jsonl"):
        server.mood = mood
        flags = ("--engine", "server", "--server", server.url, "--check", "0", *flags)
        return sample(*flags, output=output)

    return call


def test_as_it_should_be(ask, server, capsys):
    """Every third time it is overloaded."""

    def mood(question):
        if len(server.asked) % 3 == 0:
            return 503, b"later"
        text = question["messages"][-1]["content"].strip().upper()
        return answer(*(choice(f"{text} {i}") for i in range(question["n"])))

    lines = ask(mood, "--server-requests", "2")
    assert lines[0]["responses"] == [f"TWO PLUS {i}" for i in range(4)]
    assert lines[0]["finish_reasons"] == ["stop"] * 4 and "reasoning" not in lines[0]
    assert len(lines) == 10 and "40 responses of 40 asked" in capsys.readouterr().out
    asked = server.asked[0]
    assert (asked["n"], asked["temperature"], asked["max_tokens"]) == (4, 0.8, 8)
    assert "tools" not in asked and "chat_template_kwargs" not in asked


def test_one_at_a_time(ask, server, capsys):
    """A server that does not know `n` is asked until the count is there, each time otherwise."""
    lines = ask(lambda question: answer(choice(f"{question['seed']}")), "--count", "5")
    assert all(len(set(line["responses"])) == 5 for line in lines)
    first = [q["n"] for q in server.asked if q["messages"] == lines[0]["prompt"]]
    assert first == [5, 4, 3, 2, 1]
    assert "50 responses of 50 asked" in capsys.readouterr().out


def test_the_same_again(ask, capsys):
    ask(lambda question: answer(choice("only one")), "--count", "3")
    printed = capsys.readouterr().out
    assert "30 responses of 30 asked" in printed
    assert "20 responses repeat another one of their prompt" in printed


def test_more_than_asked(ask):
    lines = ask(lambda question: answer(*[choice("x")] * 9), "--count", "2")
    assert all(len(line["responses"]) == 2 for line in lines)


@pytest.mark.parametrize(
    ("found", "missing"),
    [
        ([choice(None, "length", reasoning_content="endless")], {"cut": 1, "not sent": 1}),
        ([choice(None, "stop", reasoning="done")] * 2, {"empty": 2}),
        ([choice("cut \ud83d", "length")] * 2, {"not Unicode": 2}),
        ([choice("x", "content_filter")] * 2, {"content_filter": 2}),
        ([choice("x", "abort")] * 2, {"ended by abort": 2}),
        ([], {"not sent": 2}),
    ],
)
def test_none_that_is_whole(ask, server, capsys, found, missing):
    lines = ask(lambda question: answer(*found), "--count", "2", "--retries", "1")
    assert all(line["responses"] == [] and line["missing"] == missing for line in lines)
    assert len(server.asked) == 20, "once, and one retry"
    printed = capsys.readouterr().out
    for fault, count in missing.items():
        assert f"{10 * count} {fault}" in printed
    assert "'p9' 0 of 2" in printed


def test_some_are_cut(ask, server, capsys):
    """What is cut is asked for again, and kept only where that is wanted, marked."""

    def mood(question):
        return answer(choice("half", "length"), *[choice("whole")] * (question["n"] - 1))

    lines = ask(mood, "--count", "3", "--retries", "0")
    assert all(line["responses"] == ["whole"] * 2 for line in lines)
    assert all(line["missing"] == {"cut": 1} for line in lines)
    assert (
        "20 responses of 30 asked, of talker: 10 cut at --max-tokens 8" in capsys.readouterr().out
    )
    lines = ask(mood, "--count", "3", "--keep-cut", output="kept.jsonl")
    assert all(line["finish_reasons"] == ["length", "stop", "stop"] for line in lines)


def test_reasoning(ask):
    """In a field of its own, in another one, or in the text."""
    whole = [
        choice("It is 4.", reasoning_content="two plus two"),
        choice("It is 4!", reasoning="two plus two"),
        choice("<think>\ntwo plus two\n</think>\n\nIt is 4?"),
        choice("4"),
    ]
    (line, *_) = ask(lambda question: answer(*whole))
    assert line["responses"] == ["It is 4.", "It is 4!", "It is 4?", "4"]
    assert line["reasoning"] == ["two plus two"] * 3 + [None]


def test_no_finish_reason(ask, capsys):
    lines = ask(lambda question: answer(*[choice("x", None)] * question["n"]))
    assert lines[0]["finish_reasons"] == ["unknown"] * 4
    assert "40 responses have no finish reason: some may be cut" in capsys.readouterr().out


def test_tools_and_options(ask, server, prompts):
    """What a record has goes to the server, and calls come back."""
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    thinking = {"enable_thinking": False}
    record = {"id": 0, "prompt": "2+2?", "tools": [tool], "chat_template_kwargs": thinking}
    prompts.write_text(json.dumps(record))
    function: dict[str, Any] = {"name": "add", "arguments": "{}"}
    call = {"id": "1", "type": "function", "function": function}
    flags = ("--count", "1", "--chat-template-options", '{"effort": "low"}', "--model", "remote")
    (line,) = ask(lambda question: answer(choice(None, "tool_calls", tool_calls=[call])), *flags)
    assert line["id"] == "0" and line["tools"] == [tool]
    function["arguments"] = {}
    assert line["tool_calls"] == [[call]] and line["finish_reasons"] == ["tool_calls"]
    (question,) = server.asked
    assert question["tools"] == [tool]
    assert question["chat_template_kwargs"] == {"effort": "low", "enable_thinking": False}


def test_calls_that_a_server_does_not_parse(ask, prompts, capsys):
    """They come as text, which is no answer; without tools the same text is one."""
    said = '<tool_call>\n{"name": "sum", "arguments": {"a": 1}}\n</tool_call>'
    records = [{"id": "with", "prompt": "1+1?", "tools": [SUM]}, {"id": "none", "prompt": "1+1?"}]
    prompts.write_text("\n".join(map(json.dumps, records)))
    calling, plain = ask(lambda _: answer(choice("two"), choice(said)), "--count", "2")
    assert calling["responses"] == ["two", "two"] and plain["responses"] == ["two", said]
    assert calling["left_out"] == {"a tool call as text": 1} and "left_out" not in plain
    assert "left out while asking: 1 a tool call as text" in capsys.readouterr().out


def test_refusals(ask, capsys):
    """One prompt's are skipped if that is wanted; those of all prompts never are."""

    def mood(question):
        if question["model"] == "unknown":
            return 404, b"no such model"
        if question["messages"][-1]["content"].strip() == "two plus":
            return 400, b"too long"
        return answer(*[choice("x")] * question["n"])

    with pytest.raises(UserError, match="refuses 'p0': too long"):
        ask(mood)
    lines = ask(mood, "--on-bad-record", "skip", output="skip.jsonl")
    assert lines[0]["missing"] == {"refused": 4} and len(lines[1]["responses"]) == 4
    assert "36 responses of 40 asked, of talker: 4 refused" in capsys.readouterr().out
    with pytest.raises(UserError, match="refuses 'p0': no such model"):
        ask(mood, "--model", "unknown", "--on-bad-record", "skip", output="b.jsonl")
    for body in (b"<html>", b"{}", b'{"choices": [1]}', b'{"choices": 3}'):
        with pytest.raises(UserError, match="does not answer 'p0'"):
            ask(lambda question, body=body: (200, body), output="c.jsonl")


@pytest.mark.parametrize(
    "words",
    ["--temperature nan", "--temperature -1", "--temperature inf", "--top-p nan", "--top-p 0",
     "--top-p 1.1", "--check-tolerance nan", "--check-tolerance=-1"],
)  # fmt: skip
def test_numbers_that_cannot_be(sample, words):
    with pytest.raises(UserError, match="is [-.a-z0-9]+, expected a number (above|of at least) 0"):
        sample(*words.split())


def test_a_time_that_cannot_be(sample, server):
    with pytest.raises(UserError, match="--server-timeout is nan, expected a number above 0"):
        sample("--engine", "server", "--server", server.url, "--server-timeout", "nan")


def test_flags_that_go_together(sample, server):
    with pytest.raises(UserError, match="go together"):
        sample("--server", server.url)
    with pytest.raises(UserError, match="--server is localhost:8000, expected such as http"):
        sample("--engine", "server", "--server", "localhost:8000")
    with pytest.raises(UserError, match="--check-model is for --engine server"):
        sample("--check-model", "x")
    with pytest.raises(UserError, match="--chat-template has no effect"):
        sample("--engine", "server", "--server", server.url, "--model", "x", "--chat-template", "y")
    with pytest.raises(UserError, match="cannot read --server-key-file"):
        sample("--engine", "server", "--server", server.url, "--server-key-file", "none")


@pytest.fixture(scope="module")
def replies(talker):
    """A server's answers with the model's own log-probs, at temperature 1, and a change to them."""
    chat = ChatTokenizer.from_pretrained(talker)
    network = AutoModelForCausalLM.from_pretrained(talker, dtype=torch.float32).eval()

    def make(change: float = 0.0, extra: str = ""):
        def mood(question):
            assert question["logprobs"] and question["temperature"] == 1 and question["n"] == 1
            messages = question["messages"]
            if extra:
                messages = [{"role": "system", "content": extra}, *messages]
            ids = chat.prompt_ids([(messages, "")])[0]
            text = "the sun and the moon"
            new = chat.tokenizer(text, add_special_tokens=False)["input_ids"] + [0]
            with torch.no_grad():
                logprobs = network(torch.tensor([ids + new])).logits[0].log_softmax(-1)
            content = [
                {"token": chat.tokenizer.decode([token]),
                 "logprob": float(logprobs[len(ids) + i - 1, token]) + change}
                for i, token in enumerate(new)
            ]  # fmt: skip
            return answer(choice(text) | {"logprobs": {"content": content}})

        return mood

    return make


@pytest.mark.parametrize(
    ("made", "flags", "message"),
    [
        ({}, ["--check-tolerance", "0.01"], None),
        ({"change": -0.3}, [], "0.3 at most, 0.3 in the mean"),
        ({"extra": "Answer in French."}, ["--check-tolerance", "0.05"], "same chat template"),
    ],
)
def test_check(sample, server, replies, capsys, made, flags, message):
    """The engine's log-probs equal the scorer's, unless its template or weights differ."""
    server.mood = replies(**made)
    flags = ["--engine", "server", "--server", server.url, "--check-only", "--check", "2", *flags]
    if message is None:
        assert sample(*flags) == []
        assert "tokens of 2 responses differ by" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=message):
            sample(*flags)


def test_check_is_not_possible(sample, server):
    """Without log-probs, or without the model's folder, that is said."""
    flags = ["--engine", "server", "--server", server.url, "--check-only"]
    server.mood = lambda question: answer(choice("x"))
    with pytest.raises(UserError, match="not checked: the server gives no log-probs"):
        sample(*flags)
    server.mood = lambda question: (400, b"no logprobs here")
    with pytest.raises(UserError, match="not checked: the server refuses .*no logprobs here"):
        sample(*flags)
    with pytest.raises(UserError, match="not checked: no model's folder.*--check-model"):
        sample(*flags, "--model", "some-name")
