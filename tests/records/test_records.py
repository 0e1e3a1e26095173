import subprocess
import sys

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.messages import BadRecordError, reply
from megatron_infifpo.records.records import (
    ReadReport,
    parse_record,
    read_records,
    records_fingerprint,
)
from megatron_infifpo.records.rendered_text import rendered_mark
from support.datasets import record, write_jsonl

GOOD = {"id": "a", "domain": "math", "prompt": "1+1?", "chosen": "2", "rejected": "3"}
USER = {"role": "user", "content": "1+1?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BAD = {
    "broken JSON": ('{"id": ', "broken JSON"),
    "not an object": ([1], "a list ([1]), expected an object"),
    "no chosen": ({"prompt": "q", "rejected": "3"}, "field 'chosen' is missing"),
    "no rejected": ({"prompt": "q", "chosen": "3"}, "field 'rejected' is missing"),
    "no prompt": ({"chosen": "2", "rejected": "3"}, "field 'prompt' is missing"),
    "prompt type": (dict(GOOD, prompt=5), "field 'prompt' is a number (5), expected a string"),
    "chosen type": (dict(GOOD, chosen=5), "field 'chosen' is a number (5), expected a string"),
    "id type": (dict(GOOD, id=[1]), "'id' is a list ([1]), expected a string"),
    "id bool": (dict(GOOD, id=True), "'id' is a boolean (True), expected a string"),
    "domain type": (dict(GOOD, domain={}), "'domain' is an object"),
    "empty id": (dict(GOOD, id=" "), "'id' is empty"),
    "empty": (dict(GOOD, chosen=" \n"), "field 'chosen' is empty"),
    "empty rejected": (dict(GOOD, rejected=[assistant("")]), "field 'rejected' is empty"),
    "equal": (dict(GOOD, rejected="2"), "'chosen' equals 'rejected'"),
    "equal but blanks": (dict(GOOD, rejected=" 2\n"), "'chosen' equals 'rejected'"),
    "pivot equal": (dict(GOOD, pivot_chosen="3"), "'pivot_chosen' equals 'rejected'"),
    "pivot empty": (dict(GOOD, pivot_chosen=""), "field 'pivot_chosen' is empty"),
    "empty prompt": (dict(GOOD, prompt=" "), "the prompt's last message"),
    "no messages": (dict(GOOD, prompt=[]), "field 'prompt' is missing or empty"),
    "prompt end": (dict(GOOD, prompt=[USER, assistant("x")]), "the prompt's last message"),
    "reply end": (
        dict(GOOD, chosen=[assistant("a"), USER]),
        "after the prompt, expected a reply",
    ),
    "user reply": (dict(GOOD, chosen=[USER]), "'chosen' is a whole conversation"),
    "role": (dict(GOOD, prompt=[dict(USER, role="bot")]), "has the role 'bot', expected one of"),
    "message type": (dict(GOOD, prompt=["hi"]), "message 'prompt[0]' is a string ('hi')"),
    "content type": (dict(GOOD, prompt=[dict(USER, content=[])]), "'prompt[0]' is a list ([])"),
    "no content": (dict(GOOD, prompt=[{"role": "user"}]), "'prompt[0]' has no content"),
    "tool calls": (dict(GOOD, prompt=[dict(USER, tool_calls=[1])]), "has tool_calls with a number"),
    "surrogate": (dict(GOOD, chosen="a\ud800"), "half a surrogate pair"),
    "surrogate id": (dict(GOOD, id="a\ud800"), "'id' holds half a surrogate pair"),
    "implicit empty": ({"chosen": [], "rejected": []}, "an empty list"),
    "duplicate": (dict(GOOD, id="ok"), "duplicate id 'ok', first used at"),
    "pivot in some": (dict(GOOD, pivot_chosen="4"), "although the first record is a pair"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_named_and_can_be_skipped(tmp_path, name):
    bad, message = BAD[name]
    path = write_jsonl(tmp_path / "t.jsonl", dict(GOOD, id="ok"), bad, dict(GOOD, id="z"))
    with pytest.raises(UserError) as caught:
        read_records([path])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "expected" in str(caught.value)
    report = ReadReport()
    assert [r.id for r in read_records([path], on_bad="skip", report=report)] == ["ok", "z"]
    assert report.skipped == [str(caught.value)]


def test_the_first_of_several_errors_is_reported_and_skips_are_told(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", GOOD, dict(GOOD, id="b", chosen=""), "{", GOOD)
    with pytest.raises(UserError, match=r"t\.jsonl:2: .*'chosen' is empty"):
        read_records(path)
    report = ReadReport()
    assert len(read_records(path, on_bad="skip", report=report)) == 1
    places = [message.split(": ")[0] for message in report.skipped]
    assert places == [f"{path}:{n}" for n in (2, 3, 4)]


def test_a_file_without_a_usable_record_is_named(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", dict(GOOD, chosen=""), "{")
    with pytest.raises(
        UserError, match=r"t\.jsonl: none of 2 records can be used, .*:1: field 'ch"
    ):
        read_records(path, on_bad="skip")


def test_ignored_fields_are_listed_once_with_counts(tmp_path, capsys):
    lines = [dict(GOOD, id=str(i), source="x", prompt=[USER | {"date": 1}]) for i in range(1200)]
    path = write_jsonl(
        tmp_path / "t.jsonl", *lines, dict(GOOD, source=None, score=1, ref=-2.0), "{"
    )
    report = ReadReport()
    assert len(read_records(path, on_bad="skip", report=report)) == 1201
    report.show(used={"ref"})
    assert capsys.readouterr().err.splitlines() == [
        "skipped 1 bad records:",
        f"  {report.skipped[0]}",
        "ignored fields: (messages) date (1,200 records), source (1,200), score (1)",
    ]
    report = ReadReport()
    rated = [{"answer": str(i), "rank": i} for i in range(3)]
    nectar = [{"prompt": "1+1?", "answers": rated[:n]} for n in (3, 2, 3)]
    path = write_jsonl(tmp_path / "n.jsonl", *nectar)
    assert [len(r.responses) for r in read_records(path, report=report)] == [2, 2, 2]
    report.show()
    assert capsys.readouterr().err.splitlines() == [
        "2 records with more than two rated responses: the best and the worst of each are read; "
        "--lists reads all"
    ]
    report = ReadReport()
    read_records(path, lists=True, report=report)
    report.show()
    assert not capsys.readouterr().err


def test_duplicates_are_found_across_files(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", GOOD)
    second = write_jsonl(tmp_path / "b.jsonl", GOOD)
    with pytest.raises(
        UserError, match=r"b\.jsonl:1: duplicate id 'a', first used at .*a\.jsonl:1"
    ):
        read_records([first, second])


def test_fingerprint_depends_on_content_and_order_only():
    records = [record(i) for i in range(4)]
    base = records_fingerprint(records)
    assert records_fingerprint(iter(records)) == base
    assert records_fingerprint(records[::-1]) != base
    assert records_fingerprint([*records[:3], record(3, domain="x")]) != base
    assert records_fingerprint([*records[:3], record(3, pivot=True)]) != base


def test_the_module_is_light():
    code = "import sys, megatron_infifpo.records.records; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "'megatron_infifpo.records.records'" in loaded
    for heavy in ("torch", "numpy", "transformers", "megatron.core", "pyarrow"):
        assert f"'{heavy}'" not in loaded


def test_real_sharegpt_file(shared_data):
    records = read_records(shared_data / "dpo_en_demo.json")
    assert len(records) == 300 and records[7].id == "dpo_en_demo-7"
    assert sum(r.prompt[0]["role"] == "system" for r in records) == 80
    assert sum(len(r.prompt) > 2 for r in records) == 106


RENDERED = {
    "<|im_start|>system\nBrief!<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n": "<|im_start|>system",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi": "<|begin_of_text|>",
    "<s>[INST] Hi [/INST]": "<s>[INST]",
    "Hi<|im_end|>\n<|im_start|>assistant\n<think>\n": "<|im_start|>assistant",
    "<bos><start_of_turn>user\nHi<end_of_turn>": "<bos><start_of_turn>user",
    "<｜User｜>Hi<｜Assistant｜>": "<｜User｜>",
    "<|start_of_role|>user<|end_of_role|>Hi": "<|start_of_role|>user",
    "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Hi": "<BOS_TOKEN>",
    "<|header_start|>user<|header_end|>\n\nHi": "<|header_start|>user",
    "[|user|]Hi\n[|assistant|]": "[|user|]",
    "GPT4 Correct User: Hi<|end_of_turn|>GPT4 Correct Assistant:": "GPT4 Correct User:",
    "<extra_id_1>User\nHi": "<extra_id_1>User",
    "System: x<|separator|>\n\nHuman: Hi<|separator|>\n\nAssistant:": "<|separator|>",
}


@pytest.mark.parametrize("prompt", RENDERED)
def test_a_prompt_that_a_template_rendered_is_refused(prompt):
    value = {"prompt": prompt, "chosen": "Yes.", "rejected": "No."}
    with pytest.raises(BadRecordError, match="'prompt' is rendered by a chat template") as refused:
        parse_record(value, default_id="x")
    assert RENDERED[prompt] in str(refused.value)


@pytest.mark.parametrize(
    "chosen",
    ["Yes.<|im_end|>\n", "Yes.</s>", "Yes.<end_of_turn>", "Yes.<|eot|>", "Yes.[|endofturn|]",
     "Yes.<｜end▁of▁sentence｜>", "<|channel|>analysis<|message|>x<|end|>Yes."],
)  # fmt: skip
def test_a_reply_that_a_template_rendered_is_refused(chosen):
    value = {"prompt": "Hi", "chosen": chosen, "rejected": "No."}
    with pytest.raises(BadRecordError, match="'chosen' is rendered by a chat template"):
        parse_record(value, default_id="x")


def test_text_that_speaks_of_templates_is_text():
    text = "In ChatML a turn is <|im_start|>user ... <|im_end|>, and <s>[INST] elsewhere."
    value = {"prompt": f"Why? {text}", "chosen": text, "rejected": "In HTML: <s>old</s>"}
    assert parse_record(value, default_id="x")[0].responses[0] == reply(text)


@pytest.mark.parametrize(
    "text",
    ["USER: Hi ASSISTANT:", "### Instruction:\nHi\n\n### Response:", "let a = [|x|]",
     "<|begin_of_thought|>x<|end_of_thought|> 4", "x <| y", "[1] <b>a</b>"],
)  # fmt: skip
def test_other_headings_and_marks_are_text(text):
    assert rendered_mark(text) is None and rendered_mark(text, reply=True) is None
