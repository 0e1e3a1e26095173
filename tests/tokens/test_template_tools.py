"""Calls of tools in prompts, and their results: right, or refused with a reason."""

import json
import re
from typing import Any

import pytest

from megatron_infifpo.records.records import PreferenceRecord, reply
from megatron_infifpo.tokens.chat_template import RefusedRecordError
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support import templates
from support.datasets import CHATML, byte_tokenizer
from support.templates import NAMES

ASKED, AGAIN = ({"role": "user", "content": text} for text in ("How far?", "And back?"))
ANSWER = {"role": "assistant", "content": "It is ANSWERED."}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "route",
            "description": "Measure a DISTANCE.",
            "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
        },
    },
)


def calling(*arguments: dict[str, Any], content: str = "", **more: Any) -> dict[str, Any]:
    calls = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": "route", "arguments": a}}
        for i, a in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def result(text: str, number: int = 0) -> dict[str, Any]:
    return {"role": "tool", "name": "route", "tool_call_id": f"call0000{number}", "content": text}


ODD = {"to": 'the "FIRST"\nplace \\ é', "by": [7003, {"speed": 7.5}], "toll": None, "night": True}
PROMPTS: dict[str, tuple[dict[str, Any], ...]] = {
    "a result": (ASKED, calling(ODD), result('{"km": "RESULT"}')),
    "an answer": (ASKED, calling({"to": "FIRST"}, reasoning_content="THOUGHT"), result("RESULT"),
                  ANSWER, AGAIN),
    "two calls": (ASKED, calling({"to": "FIRST"}, {"to": "SECOND"}), result("RESULT"),
                  result("OTHER", 1), ANSWER, AGAIN),
    "words and a call": (ASKED, calling({"to": "FIRST"}, content="I LOOK."), result("RESULT"),
                         ANSWER, AGAIN),
}  # fmt: skip
CALLS = re.compile(
    r"(diffusion_gemma|gemma4|glm4moe|gptoss|lfm2_v2|lfm2_2_5|llama3_[12]|mistral|muse_glimmer"
    r"|nemotron|qwen2\.5|qwen2_5(?!_vl)|qwen3)"
)
# What is refused of the templates that write calls: kind of prompt, its score -> reason, of which.
ONE, SWAPS = r"(gptoss|llama3_[12])", r"(diffusion_gemma|gemma4(?!_v2))"
LATER, FORGETS = r"(qwen3_5_think$|qwen3_6$|mistral)", r"(diffusion_gemma|gemma4(?!_v2)|glm4moe$)"
REFUSED = {
    ("two calls", "last"): {"one call of a message": ONE},
    ("two calls", "all"): {"one call of a message": ONE, "otherwise": LATER},
    ("words and a call", "last"): {
        "role assistant as it is": rf"{ONE}|muse_glimmer",
        "role tool as it is": SWAPS,
    },
    ("words and a call", "all"): {
        "role assistant as it is": rf"{ONE}|muse_glimmer",
        "role tool as it is": SWAPS,
        "otherwise": LATER,
    },
    ("an answer", "all"): {"otherwise": rf"{LATER}|{FORGETS}"},
}


def expected(name, kind, score):
    """Why a template must refuse a prompt; None if it must not."""
    if not CALLS.match(name):
        return "does not write tool"
    found = REFUSED.get((kind, score), {})
    return next((reason for reason, names in found.items() if re.match(names, name)), None)


def check(chat: ChatTokenizer, name: str, score: str) -> None:
    """Compare what is scored with what transformers renders, or find it refused."""
    if score == "all":
        chat = ChatTokenizer(chat.tokenizer, name, score=score)
    for kind, prompt in PROMPTS.items():
        replies = ((calling({"to": "HOME"}),), reply("It is FAR."))
        record = PreferenceRecord("x", "general", prompt, replies, tools=TOOLS)
        if reason := expected(name, kind, score):
            with pytest.raises(RefusedRecordError, match=reason):
                chat.encode(record)
            continue
        text, ids = chat.render(record), chat.encode(record)
        marks = ids.scored or [[True] * len(r) for r in ids.response_ids]
        for number, messages in enumerate(replies):
            whole = chat.tokenizer.apply_chat_template(
                [*prompt, *messages], tools=list(TOOLS), tokenize=False
            )
            found = text.replies[number]
            shown = text.prompt + found.text
            assert whole.startswith(shown) and whole.removeprefix(shown).strip() in ("", "</s>")
            joined = [*ids.prompt_ids.tolist(), *ids.response_ids[number].tolist()]
            assert joined == chat.tokenizer(shown, add_special_tokens=False)["input_ids"]
            kept = chat.tokenizer.decode(ids.response_ids[number][list(marks[number])].tolist())
            spans = [found.text[a:b] for a, b in found.scored]
            assert kept == "".join(spans)
            said = json.dumps(prompt)
            for word in ("DISTANCE", "FIRST", "7003", "SECOND", "RESULT", "OTHER", "ANSWERED"):
                assert (word in whole) == (word in said or word == "DISTANCE"), (kind, word)
                own = word in ("FIRST", "7003", "SECOND", "ANSWERED") and word in said
                assert (word in kept) == (own and score == "all"), (kind, word)
            assert ("HOME" in kept, "It is FAR." in kept) == (number == 0, number == 1)
            assert "How far" not in kept and "And back" not in kept
            turns = sum(m["role"] == "assistant" for m in (*prompt, *messages))
            assert len(spans) == (turns if score == "all" else 1)
            dropped = "THOUGHT" in said and "THOUGHT" not in whole
            assert dropped == ("leaves out the reasoning of" in " ".join(text.notes))


@pytest.mark.parametrize("score", ["last", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_published_templates(name, score):
    check(templates.chat(name), name, score)


@pytest.mark.parametrize("score", ["last", "all"])
@pytest.mark.parametrize("name", ["mistral-small", "phi-4", "qwen2.5"])
def test_real_tokenizers(real, name, score):
    check(real[name], name, score)


CALL = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ ARGUMENTS }}{% endfor %}"


@pytest.mark.parametrize(
    "arguments", ["", "c.function.arguments.to", "c.function.arguments | tojson"]
)
def test_arguments_that_a_template_drops(arguments):
    """In prompts, also of sampling; a result that repeats the arguments does not stand for them."""
    written = CALL.replace("ARGUMENTS", arguments or "''")
    chat = ChatTokenizer(byte_tokenizer(CHATML.replace("<|im_end|>", f"{written}<|im_end|>")))
    prompt = (ASKED, calling({"to": "X", "by": 7, "no": None}), result("7"))
    record = PreferenceRecord("x", "general", prompt, (reply("It is X."), reply("8.")))
    if arguments.endswith("tojson"):
        assert '"to": "X", "by": 7' in chat.render_prompt(prompt)
        assert chat.render(record).prompt == chat.render_prompt(prompt)
        return
    for ask in (lambda: chat.encode(record), lambda: chat.render_prompt(prompt, "x")):
        with pytest.raises(RefusedRecordError, match="it leaves out arguments of a call"):
            ask()
