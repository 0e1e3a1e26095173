"""Responses: reasoning apart from the answer, and why one is no whole response."""

import pytest

from megatron_infifpo.responses.answers import MARKERS, Response, from_choice, split_reasoning

QWEN = "{% if '</think>' in content %}"
ASKED = "<|im_start|>assistant\n"
GPT_OSS = "<|start|>assistant<|channel|>final<|message|>"
FINAL = "<|channel|>final<|message|>"
THOUGHT = "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant"


@pytest.mark.parametrize(
    ("text", "template", "prompt", "expected"),
    [
        ("<think>\ntwo and two\n</think>\n\n4.", QWEN, ASKED, ("4.", "two and two")),
        ("two and two\n</think>\n\n4.", QWEN, ASKED + "<think>\n", ("4.", "two and two")),
        ("two and two\n</think>\n\n4.", QWEN, ASKED, ("4.", "two and two")),
        ("4.", QWEN, ASKED + "<think>\n\n</think>\n\n", ("4.", None)),
        ("4.", QWEN, ASKED, ("4.", None)),
        ("two and", QWEN, ASKED + "<think>\n", ("", "two and")),
        ("<think>\ntwo and", QWEN, ASKED, ("", "two and")),
        ("<think>\n\n</think>\n\n4.", QWEN, ASKED, ("4.", None)),
        ("Say <think>x</think> first.", QWEN, ASKED, ("Say <think>x</think> first.", None)),
        ("<think>two</think>4.", "no markers", ASKED, ("<think>two</think>4.", None)),
        ("[THINK]two and two[/THINK]4.", "[THINK] [/THINK]", "[/INST]", ("4.", "two and two")),
        ("<|channel>thought\ntwo and two\n<channel|>4.", "<channel|>", "", ("4.", "two and two")),
        (f"{THOUGHT}{FINAL}4.", GPT_OSS, "<|start|>assistant", ("4.", "two and two")),
        (f"{FINAL}4.", GPT_OSS, "<|start|>assistant", ("4.", None)),
        ("<|channel|>analysis<|message|>two", GPT_OSS, "", ("", "two")),
    ],
)
def test_reasoning_is_apart(text, template, prompt, expected):
    assert split_reasoning(text, template, prompt) == expected


def test_every_marker_of_a_template_is_known():
    """Every pair of markers splits what it stands around."""
    for start, end in MARKERS:
        assert split_reasoning(f"{start}\nso\n{end}\n\nyes", end, "") == ("yes", "so")


@pytest.mark.parametrize(
    ("choice", "fault", "reasoning"),
    [
        ({"message": {"content": "4."}, "finish_reason": "stop"}, None, None),
        ({"message": {"content": "4."}}, None, None),
        ({"message": {"content": "4."}, "finish_reason": "eos_token"}, None, None),
        ({"message": {"content": "4."}, "finish_reason": "length"}, "cut", None),
        ({"message": {"content": "4."}, "finish_reason": "content_filter"}, "content_filter", None),
        ({"message": {"content": "4."}, "finish_reason": "abort"}, "ended by abort", None),
        ({"message": {"content": " \n"}, "finish_reason": "stop"}, "empty", None),
        ({"message": {"content": None, "reasoning": "so"}, "finish_reason": "stop"}, "empty", "so"),
        ({"message": {"content": "4", "reasoning_content": "so"}, "finish_reason": "stop"}, None,
         "so"),
        ({"message": {"content": None, "tool_calls": [{"function": {"name": "f"}}]},
          "finish_reason": "tool_calls"}, None, None),
        ({"message": {"content": None, "tool_calls": [{"name": "f", "arguments": "{"}]},
          "finish_reason": "tool_calls"}, "ended by a broken tool call", None),
        ({"message": {"content": "4 \ud83d"}, "finish_reason": "stop"}, "not Unicode", None),
        ({"message": {"content": [{"type": "text", "text": "4."}]}, "finish_reason": "stop"}, None,
         None),
    ],
)  # fmt: skip
def test_whole_or_not(choice, fault, reasoning):
    found = from_choice(choice)
    assert (found.fault, found.reasoning) == (fault, reasoning)


def test_only_a_cut_text_is_kept_if_cut():
    assert Response("4 and", "length").kept_if_cut
    assert Response("", "length", "so").kept_if_cut
    assert not Response("", "length").kept_if_cut
    assert not Response("4 \ud83d", "length").kept_if_cut
    assert not Response("4").kept_if_cut
