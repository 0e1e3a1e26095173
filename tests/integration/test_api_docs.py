"""The examples in docs/api.md and in the README run as they are written."""

import re
from pathlib import Path

from support import tiny
from support.launcher import ROOT


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_api(tmp_path, ranks):
    """In a process of their own: they start Megatron."""
    tiny.save_model(tmp_path / "models" / "pivot", "llama", seed=1)
    tiny.save_model(tmp_path / "models" / "qwen", "qwen2", vocab_size=290, seed=2)
    tiny.write_records(tmp_path / "pairs.jsonl", 6)
    ranks(1, "support.snippets:run_all", str(tmp_path), snippets(ROOT / "docs" / "api.md"))
    printed = ranks.logs[0]
    assert "tensor([[-0.0697, -0.3370]]" in printed and "tensor([[0, 2]])" in printed
    assert "equal within the tolerance of 0.0001" in printed
    assert "6 records of code, general" in printed
    assert "qwen 6 records" in printed and "\nloss " in printed


def test_readme(capsys):
    (snippet,) = snippets(ROOT / "README.md")
    exec(snippet, {})
    *_, said = snippet.splitlines()
    assert capsys.readouterr().out.strip() == said.removeprefix("# ").strip()
