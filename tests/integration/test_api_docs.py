"""The examples in docs/api.md and in the README run as they are written."""

import re
from pathlib import Path

from megatron_infifpo.references.logprob_writer import REQUIRED, LogprobWriter
from megatron_infifpo.tokens.dataset import TOKENIZER_SCHEMA
from support import tiny
from support.launcher import ROOT


def snippets(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def test_api(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.save_model(tmp_path / "models" / "pivot", "llama", seed=1)
    manifest = dict.fromkeys(REQUIRED, "qwen") | {"weights_sha256": None, "versions": {}}
    manifest |= {"tokenizer": dict.fromkeys(TOKENIZER_SCHEMA)}
    responses = ("chosen", "rejected")
    with LogprobWriter("logprobs/qwen", responses=responses, manifest=manifest) as writer:
        writer.add("a", [[-1.0, -2.0], [-3.0]])
    found = snippets(ROOT / "docs" / "api.md")
    assert len(found) == 4
    for snippet in found:
        exec(snippet, {})
    printed = capsys.readouterr().out
    assert "tensor([[-0.0697, -0.3370]]" in printed and "tensor([[0, 2]])" in printed
    assert "[-1.5 -3. ]" in printed


def test_readme(capsys):
    (snippet,) = snippets(ROOT / "README.md")
    exec(snippet, {})
    *_, said = snippet.splitlines()
    assert capsys.readouterr().out.strip() == said.removeprefix("# ").strip()
