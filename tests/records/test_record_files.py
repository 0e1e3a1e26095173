"""Files of records of every kind: the same records, places in errors, and default ids."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.files import stems
from megatron_infifpo.records.records import ReadReport, read_records
from support.chats import CALLING, QUESTION, SUM, TWO
from support.datasets import write_jsonl

GOOD = {"id": "a", "domain": "math", "prompt": "1+1?", "chosen": "2", "rejected": "3"}
USER = {"role": "user", "content": "1+1?"}
BARE = {k: GOOD[k] for k in ("prompt", "chosen", "rejected")}


def write_packed(path: Path, content: bytes) -> None:
    """Write a file, compressed as its name says."""
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        stream = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(stream, "zstd") as packed:
            packed.write(content)
        content = stream.getvalue().to_pybytes()
    path.write_bytes(content)


def write_folder(folder: Path, *tables: pyarrow.Table) -> Path:
    """Write what datasets.Dataset.save_to_disk does, one file a table."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pyarrow.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": name} for name in names]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def table_of(*rows: dict[str, Any]) -> pyarrow.Table:
    return pyarrow.Table.from_pylist(list(rows))


def csv_of(*rows: dict[str, Any]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=[*rows[0]])
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    return text.getvalue().encode()


def test_every_file_kind_gives_the_same_records(tmp_path):
    values: list[dict[str, Any]]
    values = [GOOD, dict(GOOD, id="b", prompt=[USER], chosen='She said: "2,\n3"')]
    plain = write_jsonl(tmp_path / "t.jsonl", values[0], "", values[1])  # a blank line
    expected = read_records(plain)
    contents = {
        "t.jsonl": plain.read_bytes(),
        "t.json": b" " + json.dumps(values, indent=1).encode(),
        "t.csv": csv_of(*values),
    }
    for name, content in contents.items():
        for packed in ("", ".gz", ".zst"):
            write_packed(tmp_path / f"{name}{packed}", content)
            assert read_records([tmp_path / f"{name}{packed}"]) == expected, name + packed
    (tmp_path / "lines.json").write_bytes(contents["t.jsonl"])
    for name in ("t.jsonl", "t.json", "t.csv"):
        (tmp_path / f"bom-{name}").write_bytes(b"\xef\xbb\xbf" + contents[name].lstrip())
        assert read_records([tmp_path / f"bom-{name}"]) == expected, name
    rows = [{**value, "prompt": QUESTION, "pivot_chosen": None} for value in values]
    pyarrow.parquet.write_table(table_of(*rows), tmp_path / "t.parquet")
    write_folder(tmp_path / "folder", table_of(rows[0]), table_of(rows[1]))
    arrow = "folder/data-00000-of-00002.arrow"
    assert read_records([tmp_path / arrow]) == expected[:1]
    for name in ("lines.json", "t.parquet", "folder"):
        assert read_records([tmp_path / name]) == expected, name


def test_tables_with_tools(tmp_path):
    """A table gives every object all keys, null where they are absent; datasets also keeps JSON."""
    look = {"name": "look", "parameters": {"properties": {"at": {"type": "string"}}}}
    looking = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "look", "arguments": {"at": "x"}},
                }
            ],
        }
    ]
    rows = [
        {"prompt": QUESTION, "tools": [SUM], "chosen": [CALLING], "rejected": TWO},
        {"prompt": QUESTION, "tools": [{"type": "function", "function": look}], "chosen": looking,
         "rejected": TWO},
    ]  # fmt: skip
    expected = read_records(write_jsonl(tmp_path / "t.jsonl", *rows))
    pyarrow.parquet.write_table(table_of(*rows), tmp_path / "t.parquet")
    write_folder(tmp_path / "nested" / "t", table_of(*rows))
    column = pyarrow.array([json.dumps(row["tools"][0]) for row in rows])
    lists = pyarrow.ListArray.from_arrays([0, 1, 2], column.cast(pyarrow.json_()))
    names = ["tools", "prompt", "chosen", "rejected"]
    columns = [lists, *(pyarrow.array([row[n] for row in rows]) for n in names[1:])]
    write_folder(tmp_path / "json" / "t", pyarrow.Table.from_arrays(columns, names=names))
    (tmp_path / "t.csv").write_bytes(csv_of(*rows))
    for name in ("t.parquet", "nested/t", "json/t", "t.csv"):
        assert read_records(tmp_path / name) == expected, name
    assert expected[1].tools == ({"type": "function", "function": look},)


def test_defaults_count_records_and_not_lines(tmp_path):
    path = write_jsonl(
        tmp_path / "set.jsonl",
        BARE,
        "",
        dict(BARE, domain=None),
        dict(BARE, id=7),
        dict(BARE, id=0),
    )
    found = read_records(path)
    assert [r.id for r in found] == ["set-0", "set-1", "7", "0"]
    assert {r.domain for r in found} == {"general"}
    write_packed(tmp_path / "set.jsonl.gz", path.read_bytes())
    assert read_records(tmp_path / "set.jsonl.gz")[0].id == "set-0"


def test_default_ids_of_files_of_one_name(tmp_path, monkeypatch):
    """They differ, by what is around the files and not by where the command runs."""
    names = ("a/train.jsonl", "b/train.jsonl", "c/b/train.parquet", "a/other.jsonl")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        table = table_of(BARE)
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(table, tmp_path / name)
        else:
            write_jsonl(tmp_path / name, BARE)
    expected = ["a/train-0", f"{tmp_path.name}/b/train-0", "c/b/train-0", "other-0"]
    assert [r.id for r in read_records([tmp_path / name for name in names])] == expected
    monkeypatch.chdir(tmp_path / "a")
    here = ["train.jsonl", "../b/train.jsonl", "../c/b/train.parquet", "other.jsonl"]
    assert [r.id for r in read_records(here)] == expected
    write_jsonl(tmp_path / "a/train.json", BARE)
    assert [r.id for r in read_records(["train.jsonl", "train.json"])] == [
        "a/train.jsonl-0", "a/train.json-0",
    ]  # fmt: skip
    with pytest.raises(UserError, match="duplicate id 'train-0'"):
        read_records(["train.jsonl", "../a/train.jsonl"])
    assert stems([Path("/train.jsonl"), Path("/x/train.jsonl")]) == ["/train", "x/train"]


def test_places_in_files(tmp_path):
    rows = [dict(GOOD, chosen="2\n"), dict(GOOD, id="b", chosen=" ")]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(table_of(*rows), tmp_path / "t.parquet")
    write_folder(tmp_path / "t", table_of(*rows))
    (tmp_path / "t.csv").write_bytes(csv_of(*rows))
    places = {"t.json": "record 1", "t.parquet": "record 1", "t": "record 1", "t.csv": "4"}
    for name, place in places.items():
        with pytest.raises(UserError, match=f"{name}:{place}: field 'chosen' is empty"):
            read_records(tmp_path / name)


def test_text_that_is_not_utf8_is_one_bad_record(tmp_path):
    table = table_of(GOOD, dict(GOOD, id="?"), dict(GOOD, id="c"))
    broken = pyarrow.array([b"2", b"\xff", b"2"])
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, broken.buffers())
    table = table.set_column(3, "chosen", broken)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    write_folder(tmp_path / "t", table)
    lines = [b"id,prompt,chosen,rejected", b"a,q,2,3", b"b,q,\xff,3", b"c,q,2,3"]
    (tmp_path / "t.csv").write_bytes(b"\n".join(lines))
    for name, message in {
        "t.parquet": "record 1: column 'chosen' is not UTF-8",
        "t": "record 1: column 'chosen' is not UTF-8",
        "t.csv": "3: not UTF-8",
    }.items():
        with pytest.raises(UserError, match=f"{name}:{message}"):
            read_records(tmp_path / name)
        report = ReadReport()
        found = read_records(tmp_path / name, on_bad="skip", report=report)
        assert [r.id for r in found] == ["a", "c"] and len(report.skipped) == 1


def test_json_in_a_table_that_is_broken_is_one_bad_record(tmp_path):
    texts = pyarrow.array(["{}", '{"a": ', "{}"]).cast(pyarrow.json_())
    table = table_of(GOOD, dict(GOOD, id="b"), dict(GOOD, id="c"))
    write_folder(tmp_path / "t", table.append_column("chat_template_kwargs", texts))
    found = read_records(tmp_path / "t", on_bad="skip")
    assert [r.id for r in found] == ["a", "c"]
    with pytest.raises(UserError, match="record 1: it cannot be decoded"):
        read_records(tmp_path / "t")


HEADER = b"prompt,chosen,rejected\n"
UNREADABLE = {
    "absent.jsonl": (None, "no such file, expected a file of preference records"),
    "some/dataset": (None, r"no such file.*hf download some/dataset"),
    "t.txt": (b"a,b", "unknown kind of file"),
    "t.jsonl.gz": (b"no gzip", "broken gzip"),
    "cut.jsonl.gz": (gzip.compress(b"{}\n" * 99)[:-9], "broken gzip|is missing"),
    "t.jsonl.zst": (b"no zstd", "broken zstd"),
    "t.json": (b'[{"a": 1},\n{"b" 2}]', r"t\.json:2: broken JSON"),
    "t.parquet": (b"PAR1 no", "broken Parquet"),
    "latin.jsonl": ('{"id": "é"}'.encode("latin-1"), r"latin\.jsonl:1: not UTF-8"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}", r"digits\.jsonl:1: broken JSON"),
    "empty.jsonl": (b"\n", r"empty\.jsonl: the file has no records"),
    "empty.json": (b"[]", r"empty\.json: the file has no records"),
    "empty.csv": (b"", r"empty\.csv: the file has no records"),
    "header.csv": (HEADER, r"header\.csv: the file has no records"),
    "short.csv": (HEADER + b"q,2\n", r"short\.csv:2: 2 values, expected 3"),
    "twice.csv": (b"a,a\n1,2\n", r"twice\.csv:1: the columns have no names of their own"),
    "quote.csv": (HEADER + b'q,"2,3\n', r"quote\.csv:2: broken CSV"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files(tmp_path, monkeypatch, name):
    content, message = UNREADABLE[name]
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_records(name)


def test_folders_that_are_no_data_set(tmp_path):
    good = write_folder(tmp_path / "good", table_of(GOOD))
    splits = tmp_path / "splits"
    splits.mkdir()
    (splits / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(
        UserError, match=r"splits train, test, expected one .*: give \S+/splits/train"
    ):
        read_records(splits)
    with pytest.raises(UserError, match="is a folder with good, splits, expected"):
        read_records(tmp_path)
    data = good / "data-00000-of-00001.arrow"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="broken Arrow stream after record 0"):
        read_records(good)
    (good / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(UserError, match="names no data files"):
        read_records(good)


def test_what_to_do_with_bad_records_is_a_choice():
    with pytest.raises(UserError, match="on_bad"):
        read_records([], on_bad="ignore")
