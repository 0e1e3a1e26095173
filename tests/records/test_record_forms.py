"""Every form of preferences that people have: one small example, and the record it must become."""

import json
from typing import Any

import pytest

from megatron_infifpo.records.forms import FORMS
from megatron_infifpo.records.messages import BadRecordError
from megatron_infifpo.records.records import PreferenceRecord, canonical_bytes, parse_record, reply
from support.chats import CALLING, QUESTION, SUM, THREE, TWO, said

PAIR = {"chosen": "2", "rejected": "3"}
TURNS = said("u:hi", "a:hello", "u:1+1?")
RATED = [{"response": text, "overall_score": s} for text, s in (("b", 3), ("2", 9.5), ("3", 1))]
HUMAN = "\n\nHuman: 1+1?\n\nAssistant:"

# Name: (record, its prompt, chosen, rejected, what is not used).
EXAMPLES: dict[str, tuple[dict[str, Any], list, list, list, set[str]]] = {
    "strings": ({"prompt": "1+1?", **PAIR}, QUESTION, TWO, THREE, set()),
    "messages": (
        {"prompt": QUESTION, "chosen": TWO, "rejected": THREE}, QUESTION, TWO, THREE, set()
    ),
    "one message": (
        {"prompt": QUESTION[0], "chosen": TWO[0], "rejected": "3"}, QUESTION, TWO, THREE, set()
    ),
    "TRL's implicit prompt": (
        {"chosen": QUESTION + TWO, "rejected": QUESTION + THREE}, QUESTION, TWO, THREE, set()
    ),
    "ShareGPT": (
        {
            "system": "s", "conversations": [{"from": "human", "value": "1+1?"}],
            "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "3"},
        },
        said("s:s", "u:1+1?"), TWO, THREE, set(),
    ),
    "UltraFeedback-binarized": (
        {
            "prompt": "1+1? ", "chosen": QUESTION + TWO, "rejected": QUESTION + THREE,
            "messages": QUESTION + TWO, "score_chosen": 8.5, "prompt_id": None,
        },
        QUESTION, TWO, THREE, {"messages", "score_chosen"},
    ),
    "Tulu 3, with a system message": (
        {"prompt": "1+1?", "chosen": said("s:s") + QUESTION + TWO,
         "rejected": said("s:s") + QUESTION + THREE, "source": "x"},
        said("s:s", "u:1+1?"), TWO, THREE, {"source"},
    ),
    "argilla, several turns and a text": (
        {"prompt": "hi", "chosen": TURNS + TWO, "rejected": TURNS + THREE}, TURNS, TWO, THREE, set()
    ),
    "a prompt of messages beside conversations": (
        {"prompt": said("s:s") + TURNS, "chosen": TURNS + TWO, "rejected": TURNS + THREE},
        said("s:s") + TURNS, TWO, THREE, set(),
    ),
    "conversations that differ early": (
        {"chosen": said("u:hi", "a:x", "u:y", "a:2"),
         "rejected": said("u:hi", "a:z", "u:w", "a:3")},
        said("u:hi"), said("a:x", "u:y", "a:2"), said("a:z", "u:w", "a:3"), set(),
    ),
    "conversations of two lengths": (
        {"chosen": QUESTION + TWO, "rejected": QUESTION + said("a:3", "u:so?", "a:2")},
        QUESTION, TWO, said("a:3", "u:so?", "a:2"), set(),
    ),
    "tools that answer differently": (
        {"tools": json.dumps([SUM]), "chosen": [*QUESTION, CALLING, *said("t:2", "a:2")],
         "rejected": [*QUESTION, CALLING, *said("t:3", "a:3")]},
        QUESTION, [CALLING, *said("t:2", "a:2")], [CALLING, *said("t:3", "a:3")], set(),
    ),
    "tools that answer the same": (
        {"tools": [SUM], "chosen": [*QUESTION, CALLING, *said("t:2", "a:2")],
         "rejected": [*QUESTION, CALLING, *said("t:2", "a:3")]},
        [*QUESTION, CALLING, *said("t:2")], TWO, THREE, set(),
    ),
    "Intel's orca pairs": (
        {"system": "s", "question": "1+1?", **PAIR}, said("s:s", "u:1+1?"), TWO, THREE, set()
    ),
    "argilla's orca pairs": (
        {"system": "", "input": "1+1?", **PAIR, "generations": ["2", "3"], "rating": [9, 1]},
        QUESTION, TWO, THREE, {"generations", "rating"},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1+1?", "history": [["hi", "hello"]], **PAIR},
        said("u:hi", "a:hello", "u:Add.\n1+1?"), TWO, THREE, set(),
    ),
    "a history beside a prompt": (
        {"prompt": said("s:s", "u:1+1?"), "history": [["hi", "hello"]], **PAIR},
        said("s:s") + TURNS, TWO, THREE, set(),
    ),
    "a history that the prompt has": (
        {"prompt": TURNS, "history": [["hi", "hello"]], **PAIR}, TURNS, TWO, THREE, set()
    ),
    "another history": (
        {"prompt": "1+1?", "history": "x", **PAIR}, QUESTION, TWO, THREE, {"history"}
    ),
    "argilla's UltraFeedback": (
        {"instruction": "1+1?", "chosen_response": "2", "rejected_response": "3", "source": "x"},
        QUESTION, TWO, THREE, {"source"},
    ),
    "Anthropic's hh": (
        {"chosen": f"\n\nHuman: hi\n\nAssistant: hello{HUMAN} 2",
         "rejected": f"\n\nHuman: hi\n\nAssistant: hello{HUMAN} 3"},
        TURNS, TWO, THREE, set(),
    ),
    "hh with a prompt of its own": ({"prompt": HUMAN, **PAIR}, QUESTION, TWO, THREE, set()),
    "hh without its first lines": (
        {"prompt": "Human: hi\n\nAssistant: hello" + HUMAN, **PAIR}, TURNS, TWO, THREE, set()
    ),
    "a text with turns inside": (
        {"prompt": "Go on:" + HUMAN, **PAIR}, said("u:Go on:" + HUMAN), TWO, THREE, set()
    ),
    "HelpSteer3": (
        {"domain": "code", "context": TURNS, "response1": "3", "response2": "2",
         "overall_preference": 2, "individual_preference": []},
        TURNS, TWO, THREE, {"individual_preference"},
    ),
    "HelpSteer2": (
        {"prompt": "hi\n<extra_id_1>Assistant\nhello\n<extra_id_1>User\n1+1?", "response_1": "2",
         "response_2": "3", "preference_strength": "-1", "split": "train"},
        TURNS, TWO, THREE, {"split"},
    ),
    "OpenAI": (
        {"input": {"messages": QUESTION, "tools": [], "parallel_tool_calls": True},
         "preferred_output": TWO, "non_preferred_output": THREE},
        QUESTION, TWO, THREE, {"input.parallel_tool_calls"},
    ),
    "Nectar": (
        {"prompt": HUMAN + " ", "turns": 1,
         "answers": [{"answer": "x", "rank": 2}, {"answer": "2", "model": "m", "rank": 1},
                     {"answer": "3", "rank": 7}]},
        QUESTION, TWO, THREE, {"answers.model", "turns", "(rated responses)"},
    ),
    "UltraFeedback": (
        {"instruction": "1+1?", "completions": RATED, "models": ["m"]},
        QUESTION, TWO, THREE, {"models", "(rated responses)"},
    ),
    "NeMo-RL": (
        {"context": QUESTION,
         "completions": [{"rank": 1, "completion": THREE}, {"rank": 0, "completion": TWO}]},
        QUESTION, TWO, THREE, set(),
    ),
    "ms-swift": (
        {"messages": TURNS + TWO, "rejected_response": "3"}, TURNS, TWO, THREE, set()
    ),
    "Stack Exchange, paired": (
        {"question": "1+1?", "response_j": "2", "response_k": "3", "qid": 5},
        QUESTION, TWO, THREE, {"qid"},
    ),
    "SHP": (
        {"history": "1+1?", "human_ref_A": "3", "human_ref_B": "2", "labels": 0, "score_A": 7},
        QUESTION, TWO, THREE, {"score_A"},
    ),
    "PKU-SafeRLHF": (
        {"prompt": "1+1?", "response_0": "3", "response_1": "2", "better_response_id": 1,
         "safer_response_id": 0},
        QUESTION, TWO, THREE, {"safer_response_id"},
    ),
    "Chatbot Arena": (
        {"conversation_a": QUESTION + THREE, "conversation_b": QUESTION + TWO, "winner": "model_b"},
        QUESTION, TWO, THREE, set(),
    ),
    "JSON in texts, as in tables": (
        {"prompt": json.dumps(QUESTION), "chosen": json.dumps(TWO), "rejected": json.dumps(THREE)},
        QUESTION, TWO, THREE, set(),
    ),
    "a prompt that is JSON": (
        {"prompt": '{"from": "Rome", "value": 5}', **PAIR},
        said('u:{"from": "Rome", "value": 5}'), TWO, THREE, set(),
    ),
    "a reply that is JSON": (
        {"prompt": "1+1?", "chosen": '[{"a": 2}]', "rejected": "[3]"},
        QUESTION, said('a:[{"a": 2}]'), said("a:[3]"), set(),
    ),
}  # fmt: skip


def test_every_form_has_an_example():
    for name, form in FORMS.items():
        if name == "list":  # tests/records/test_lists.py
            continue
        assert any(set(form.fields) <= set(value) for value, *_ in EXAMPLES.values()), name


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_form_becomes_this_record(name):
    value, prompt, chosen, rejected, unused = EXAMPLES[name]
    record, ignored = parse_record(value, default_id="d-0")
    assert record == PreferenceRecord(
        "d-0", value.get("domain", "general"), tuple(prompt), (tuple(chosen), tuple(rejected)),
        tools=(SUM,) if "tools" in value else (),
    )  # fmt: skip
    assert ignored == unused


def test_the_pivots_best_reply_may_be_a_conversation():
    value = {"prompt": "1+1?", "chosen": QUESTION + TWO, "rejected": QUESTION + THREE}
    for own in ("It is 2.", said("a:It is 2."), QUESTION + said("a:It is 2.")):
        record, _ = parse_record(value | {"pivot_chosen": own}, default_id="d")
        assert record.responses[2] == reply("It is 2.")


ASSISTANT = {"role": "assistant", "content": ""}
ASKED = {"prompt": "1+1?", **PAIR}
BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "another prompt": (
        {"prompt": "2+2?", "chosen": QUESTION + TWO, "rejected": QUESTION + THREE},
        "field 'prompt' has '2\\+2\\?', where the conversations .* have '1\\+1\\?'",
    ),
    "prompts differ": (
        {"chosen": said("u:a", "a:2"), "rejected": said("u:b", "a:3")},
        "differ first in message 0 \\(of roles user and user\\)",
    ),
    "later prompts differ": (
        {"chosen": said("u:a", "a:2", "u:b", "a:c"), "rejected": said("u:a", "a:2", "u:d", "a:e")},
        "differ first in message 2",
    ),
    "one whole": ({"chosen": QUESTION + TWO, "rejected": "3"}, "'chosen' is a whole conversation"),
    "no answer": (
        {"chosen": QUESTION + TWO, "rejected": QUESTION}, "'rejected' ends with .* role user"
    ),
    "a longer prompt": (
        {"prompt": TURNS, "chosen": TURNS[:1] + TWO, "rejected": TURNS[:1] + THREE},
        "has 'hello', where the conversations in 'chosen' and 'rejected' have no question",
    ),
    "two systems": (
        ASKED | {"system": "a", "prompt": said("s:b", "u:x")}, "'system' has the system message 'a'"
    ),
    "system twice": (ASKED | {"system": "a", "system_prompt": "b"}, "differ, expected one system"),
    "tools": (ASKED | {"tools": "sum"}, "field 'tools' is a string"),
    "functions": (ASKED | {"functions": [SUM]}, "expected the functions in 'tools'"),
    "images": (ASKED | {"images": ["a.png"]}, "only text is scored"),
    "options": (ASKED | {"chat_template_kwargs": [1]}, "'chat_template_kwargs' is a list"),
    "reserved": (ASKED | {"chat_template_kwargs": {"tools": []}}, "sets 'tools'"),
    "ends with a tool": (ASKED | {"chosen": [CALLING, *said("t:2")]}, "expected a reply"),
    "reasoning alone": (
        ASKED | {"chosen": [ASSISTANT | {"reasoning": "x"}]}, "is empty .* after the reasoning"
    ),
    "reasoning alone, in the text": (
        ASKED | {"chosen": "<think>\nx</think>\n"}, "is empty .* after the reasoning"
    ),
    "no preference": (
        {"context": QUESTION, "response1": "2", "response2": "3", "overall_preference": 0},
        "no contrast: 'overall_preference' is 0",
    ),
    "no winner": (
        {"conversation_a": QUESTION + TWO, "conversation_b": QUESTION + THREE, "winner": "tie"},
        "no contrast: 'winner' is 'tie'",
    ),
    "one rank": (
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1}] * 2}, "no contrast: the 2 responses"
    ),
    "no rank": ({"prompt": "q", "answers": [{"answer": "a"}]}, r"'answers\[0\].rank' is missing"),
    "a score that is null": (
        {"instruction": "q", "completions": [*RATED, {"response": "c", "overall_score": None}]},
        r"field 'completions\[3\].overall_score' is null, .* response and overall_score \(--lists",
    ),
    "a response that is null": (
        {"instruction": "q", "completions": [{"response": None, "overall_score": 1}]},
        r"field 'completions\[0\].response' is null, .* response and overall_score$",
    ),
    "no object": ({"prompt": "q", "answers": ["a"]}, r"field 'answers\[0\]' is a string \('a'\)"),
    "no list of answers": ({"prompt": "q", "answers": {}}, "field 'answers' is an object"),
    "no number": (
        {"context": QUESTION, "response1": "2", "response2": "3", "overall_preference": "N/A"},
        "'overall_preference' is a string",
    ),
    "unknown": (
        {"text": "a", "label": 1},
        "'chosen' is missing, found label, text; expected .* another form .*: .*context, response1",
    ),
    "unpaired": (
        {"prompt": "q", "completion": "2", "label": True}, "join those of label true and false"
    ),
    "one conversation": (
        {"messages": QUESTION + TWO}, "another reply to compare .*infifpo sample gives"
    ),
    "Python's messages": (ASKED | {"chosen": str(TWO)}, "messages as Python prints them"),
    "OpenAI": (
        {"input": "q", "preferred_output": TWO, "non_preferred_output": THREE},
        "'input' is a string",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_record_that_cannot_be_read(name):
    value, message = BAD_RECORDS[name]
    with pytest.raises(BadRecordError, match=message):
        parse_record(value, default_id="d")


def test_system_message_that_is_there_twice_is_one():
    value = {
        "system": "s",
        "chosen": said("s:s", "u:q", "a:2"),
        "rejected": said("s:s", "u:q", "a:3"),
    }
    assert list(parse_record(value, default_id="d")[0].prompt) == said("s:s", "u:q")


def test_template_options_are_part_of_a_record():
    value = ASKED | {"chat_template_kwargs": {"enable_thinking": False}}
    record, _ = parse_record(value, default_id="d")
    assert record.template_options == {"enable_thinking": False}
    plain, _ = parse_record(ASKED, default_id="d")
    assert canonical_bytes(record) != canonical_bytes(plain)
    assert canonical_bytes(plain) == (b'["d","general",[["user","1+1?"]],"2","3"]\n'), (
        "as it has always been"
    )
