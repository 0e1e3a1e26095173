"""The examples in docs/file-formats.md run as they are written."""

import re
from pathlib import Path

from builders import byte_tokenizer, write_jsonl, write_scores

from megatron_infifpo.data.records import read_records
from megatron_infifpo.data.token_dataset import TokenDataset
from megatron_infifpo.data.token_writer import write_token_dataset
from megatron_infifpo.data.tokenization import ChatTokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "file-formats.md"


def test_examples(tmp_path, monkeypatch, capsys):
    page = PAGE.read_text(encoding="utf-8")
    (example,) = re.findall(r'^\{"id".*\}$', page, re.M)
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


def test_both_other_forms_read(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    (block,) = re.findall(r'```json\n(\{"chosen".*?)```', page, re.S)
    lines = block.replace("\n ", " ").strip().splitlines()
    first, second = read_records(write_jsonl(tmp_path / "t.jsonl", *lines))
    assert (first.prompt, first.responses) == (second.prompt, second.responses)
