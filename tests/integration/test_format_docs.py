"""The examples in docs/file-formats.md run as they are written."""

import json
import re
from pathlib import Path

from megatron_infifpo.records.forms import FORMS, form_of
from megatron_infifpo.records.records import ReadReport, read_records
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import byte_tokenizer, write_jsonl, write_scores

PAGE = Path(__file__).resolve().parents[2] / "docs" / "file-formats.md"


def test_examples(tmp_path, monkeypatch, capsys):
    page = PAGE.read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)\n```", page)
    (sources,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        Path("train.jsonl"), example, example.replace("m-17", "c-1").replace("math", "code")
    )
    records = read_records("train.jsonl")
    write_token_dataset(records, ChatTokenizer(byte_tokenizer()), "data/train")
    lengths = TokenDataset("data/train").response_lengths
    for name in ("pivot", "qwen", "coder"):
        write_scores(Path("logprobs") / name, records, lengths)
    Path("sources.yaml").write_text(sources)
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(snippets) == 4
    for snippet in snippets:
        exec(snippet, {})
    out = capsys.readouterr().out
    assert "m-17" in out and "[ True False]" in out


def test_every_other_form_reads_to_the_same_record(tmp_path):
    blocks = re.findall(r"```jsonl\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    values, lists = ([json.loads(line) for line in block.splitlines()] for block in blocks)
    for name, form in FORMS.items():
        assert any(form_of(value) is form for value in [*values, *lists]), name
    first, *others = read_records(write_jsonl(tmp_path / "t.jsonl", *values))
    for record in others:
        assert (record.prompt, record.responses) == (first.prompt, first.responses), record.id
    report = ReadReport()
    found = read_records(write_jsonl(tmp_path / "lists.jsonl", *lists), report=report)
    assert [len(record.responses) for record in found] == [3, 2, 2, 2] and not report.ignored
    assert all(record.prompt == first.prompt for record in found)
    assert found[0].scores == (1, 0, 0.5) and found[3].cut == (False, True)
    rated = [value for value in values if form_of(value).rates]
    for record in read_records(write_jsonl(tmp_path / "rated.jsonl", *rated), lists=True):
        assert record.listed and (record.prompt, record.responses) == (
            first.prompt,
            first.responses,
        )
