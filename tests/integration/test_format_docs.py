"""The examples in docs/file-formats.md run as they are written."""

import json
import re
from pathlib import Path

from megatron_infifpo.records.forms import FORMS, form_of
from megatron_infifpo.records.records import read_records
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
    (block,) = re.findall(r"```jsonl\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    values = [json.loads(line) for line in block.splitlines()]
    for name, form in FORMS.items():
        assert any(form_of(value) is form for value in values), name
    first, *others = read_records(write_jsonl(tmp_path / "t.jsonl", *values))
    for record in others:
        assert (record.prompt, record.responses) == (first.prompt, first.responses), record.id
