import gzip
import json
import subprocess
import sys
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from builders import record, write_jsonl

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.records import PreferenceRecord, read_records, records_fingerprint, reply

GOOD = {"id": "a", "domain": "math", "prompt": "1+1?", "chosen": "2", "rejected": "3"}
USER = {"role": "user", "content": "1+1?"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "strings": {"prompt": "1+1?", "chosen": "2", "rejected": "3"},
    "messages": {"prompt": [USER], "chosen": [assistant("2")], "rejected": [assistant("3")]},
    "mixed": {"prompt": [USER], "chosen": "2", "rejected": assistant("3")},
    "implicit prompt": {"chosen": [USER, assistant("2")], "rejected": [USER, assistant("3")]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "1+1?"}],
        "chosen": {"from": "gpt", "value": "2"},
        "rejected": {"from": "gpt", "value": "3"},
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_to_the_same_record(tmp_path, form):
    path = write_jsonl(tmp_path / "train.jsonl", FORMS[form])
    expected = PreferenceRecord("train-0", "general", (USER,), reply("2"), reply("3"))
    assert read_records(path) == [expected]


def test_multi_turn_with_a_system_message(tmp_path):
    turns = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2")]
    value = FORMS["sharegpt"] | {"conversations": [{"from": f, "value": v} for f, v in turns]}
    (found,) = read_records(write_jsonl(tmp_path / "t.jsonl", value))
    assert [m["role"] for m in found.prompt] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in found.prompt] == ["s", "q1", "a1", "q2"]


def test_every_file_kind_gives_the_same_records(tmp_path):
    values: list[dict[str, Any]]
    values = [GOOD, dict(GOOD, id="b", prompt=[USER], pivot_chosen=None)]
    plain = write_jsonl(tmp_path / "t.jsonl", GOOD, "", dict(GOOD, id="b"))  # a blank line
    expected = read_records(plain)
    (tmp_path / "t.json").write_text(" " + json.dumps(values, indent=1))
    (tmp_path / "lines.json").write_text(plain.read_text())
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    for name in ("t.jsonl", "t.json"):
        with gzip.open(tmp_path / f"{name}.gz", "wb") as file:
            file.write((tmp_path / name).read_bytes())
    rows = [{**value, "prompt": [USER]} for value in values]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.json", "lines.json", "bom.jsonl", "t.jsonl.gz", "t.json.gz", "t.parquet"):
        assert read_records([tmp_path / name]) == expected, name


def test_defaults_count_records_and_not_lines(tmp_path):
    bare = {k: GOOD[k] for k in ("prompt", "chosen", "rejected")}
    path = write_jsonl(tmp_path / "set.jsonl", bare, "", dict(bare, domain=None), dict(bare, id=7))
    found = read_records(path)
    assert [r.id for r in found] == ["set-0", "set-1", "7"]
    assert {r.domain for r in found} == {"general"}
    with gzip.open(tmp_path / "set.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read_records(tmp_path / "set.jsonl.gz")[0].id == "set-0"


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
    "no messages": (dict(GOOD, prompt=[]), "the prompt's last message is absent"),
    "prompt end": (dict(GOOD, prompt=[USER, assistant("x")]), "the prompt's last message"),
    "two replies": (
        dict(GOOD, chosen=[assistant("a"), assistant("b")]),
        "exactly one message of role assistant",
    ),
    "user reply": (dict(GOOD, chosen=[USER]), "holds messages of roles ['user']"),
    "role": (dict(GOOD, prompt=[dict(USER, role="tool")]), "has the role 'tool', expected one of"),
    "message type": (dict(GOOD, prompt=["hi"]), "message 'prompt[0]' is a string ('hi')"),
    "content type": (dict(GOOD, prompt=[dict(USER, content=[])]), "'prompt[0]' is a list ([])"),
    "no content": (dict(GOOD, prompt=[{"role": "user"}]), "'prompt[0]' is ['role'], expected"),
    "tool calls": (dict(GOOD, prompt=[dict(USER, tool_calls=[1])]), "has tool_calls"),
    "surrogate": (dict(GOOD, chosen="a\ud800"), "half a surrogate pair"),
    "prompts differ": (
        {"chosen": [USER, assistant("2")], "rejected": [dict(USER, content="?"), assistant("3")]},
        "differ before their last message",
    ),
    "implicit without reply": ({"chosen": [USER], "rejected": [USER]}, "holds messages of roles"),
    "implicit empty": ({"chosen": [], "rejected": []}, "empty lists"),
    "duplicate": (dict(GOOD, id="ok"), "duplicate id 'ok', first used at"),
    "pivot in some": (dict(GOOD, pivot_chosen="4"), "the first record has none"),
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
    skipped: list[str] = []
    assert [r.id for r in read_records([path], on_bad="skip", skipped=skipped)] == ["ok", "z"]
    assert skipped == [str(caught.value)]


def test_the_first_of_several_errors_is_reported_and_skips_are_told(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", GOOD, dict(GOOD, id="b", chosen=""), "{", GOOD)
    with pytest.raises(UserError, match=r"t\.jsonl:2: .*'chosen' is empty"):
        read_records(path)
    skipped = []
    assert len(read_records(path, on_bad="skip", skipped=skipped)) == 1
    assert [message.split(": ")[0] for message in skipped] == [f"{path}:{n}" for n in (2, 3, 4)]


def test_arrays_and_parquet_name_the_record(tmp_path):
    rows = [GOOD, dict(GOOD, id="b", chosen=" ")]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.json", "t.parquet"):
        with pytest.raises(UserError, match=f"{name}:record 1: field 'chosen' is empty"):
            read_records(tmp_path / name)


def test_duplicates_are_found_across_files(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", GOOD)
    second = write_jsonl(tmp_path / "b.jsonl", GOOD)
    with pytest.raises(
        UserError, match=r"b\.jsonl:1: duplicate id 'a', first used at .*a\.jsonl:1"
    ):
        read_records([first, second])


def test_unreadable_files(tmp_path):
    cases = {
        "absent.jsonl": (None, "no such file"),
        "t.csv": (b"a,b", "unknown kind of file"),
        "t.jsonl.gz": (b"no gzip", "broken gzip"),
        "cut.jsonl.gz": (gzip.compress(b"{}\n" * 99)[:-9], "broken gzip|field 'chosen'"),
        "t.json": (b'[{"a": 1},\n{"b" 2}]', r"t\.json:2: broken JSON"),
        "t.parquet": (b"PAR1 no", "broken Parquet"),
        "latin.jsonl": ('{"id": "é"}'.encode("latin-1"), r"latin\.jsonl:1: not UTF-8"),
    }
    for name, (content, message) in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_records(tmp_path / name)
    with pytest.raises(UserError, match="on_bad"):
        read_records([], on_bad="ignore")


def test_fingerprint_depends_on_content_and_order_only(tmp_path):
    records = [record(i) for i in range(4)]
    base = records_fingerprint(records)
    assert records_fingerprint(iter(records)) == base
    assert records_fingerprint(records[::-1]) != base
    assert records_fingerprint([*records[:3], record(3, domain="x")]) != base
    assert records_fingerprint([*records[:3], record(3, pivot=True)]) != base
    forms = [
        read_records(write_jsonl(tmp_path / "train.jsonl", FORMS[form]), on_bad="error")
        for form in FORMS
    ]
    assert len({records_fingerprint(found) for found in forms}) == 1


def test_the_module_is_light():
    code = "import sys, megatron_infifpo.data.records; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert "'megatron_infifpo.data.records'" in loaded
    for heavy in ("torch", "numpy", "transformers", "megatron.core", "pyarrow"):
        assert f"'{heavy}'" not in loaded


def test_real_sharegpt_file(shared_data):
    records = read_records(shared_data / "dpo_en_demo.json")
    assert len(records) == 300 and records[7].id == "dpo_en_demo-7"
    assert sum(r.prompt[0]["role"] == "system" for r in records) == 80
    assert sum(len(r.prompt) > 2 for r in records) == 106
