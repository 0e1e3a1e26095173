"""A run of small files: nothing in it is run for real."""

from pathlib import Path

import pytest

from megatron_infifpo.run import layouts
from megatron_infifpo.run.plan import Layouts
from megatron_infifpo.run.schema import Layout

TEXT = """\
output: out
precision: fp32
pivot: {model: pivot, chat_template_options: {enable_thinking: false, budget: 512}}
sources:
  - {name: qwen2, model: qwen}
  - {name: qwen2.5, model: coder, domains: [code], flags: {max-row-tokens: 4096}}
data: {pairs: [pairs.jsonl], heldout: [heldout.jsonl]}
train:
  - {method: sft, lr: 1e-6, epochs: 3}
  - {method: infifpo, flags: {clip-grad: 0.5, log-interval: 10}}
  - {name: dpo, method: infifpo, flags: {reference: initial}}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a run.yaml and what it names are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(layouts, "count_gpus", lambda: 0)
    for name in ("pivot", "qwen", "coder"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    (tmp_path / "heldout.jsonl").write_text("{}\n")
    (tmp_path / "run.yaml").write_text(TEXT)
    return tmp_path


@pytest.fixture
def plain() -> Layouts:
    """One rank for everything."""
    rows = ("--micro-batch-tokens", "8192")
    return Layouts(dict.fromkeys(("sft", "infifpo", "dpo"), rows), {"pivot": Layout()})
