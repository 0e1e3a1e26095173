"""A source that alone knows a rule teaches it to a pivot with another tokenizer."""

import importlib
import re

import pytest

from megatron_infifpo.references.soft_targets import SoftTargetStore
from megatron_infifpo.tokens.dataset import TokenDataset
from support.launcher import ROOT


@pytest.fixture
def rule(monkeypatch, ranks):
    """The example, whose commands run on forked ranks instead of starting Python each time."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "demo"))
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "baselines"))
    example = importlib.import_module("rule")

    def command(self, *words, ranks: int = 0, log=None, start=ranks):
        start(1, "support.tools:command", "megatron_infifpo", list(map(str, words)))
        log.parent.mkdir(exist_ok=True)
        log.write_text(start.logs[0])

    monkeypatch.setattr(example.RuleJob, "command", command)
    return example


def test_a_source_teaches_its_rule(rule, monkeypatch, tmp_path, capsys):
    """Held-out cross-entropy is below SFT's on the same texts; with shuffled targets it is not."""
    monkeypatch.setattr(rule, "SIZES", {"train": 256, "heldout": 384})
    argv = ["rule", "--output", str(tmp_path), "--seeds", "1", "--only", "half", "shuffled"]
    monkeypatch.setattr("sys.argv", argv)
    rule.main()
    table = capsys.readouterr().out
    found = {}
    for name in ("sft", "half", "shuffled"):
        row = next(line for line in table.splitlines() if line.startswith(rule.VARIANTS[name][0]))
        last, _, lowest = re.findall(r"[+-]?\d\.\d{4}", row)
        found[name] = float(last), float(lowest)
    floor = float(re.findall(r"the rule itself +(\S+)", table)[0])
    sft, taught, shuffled = (found[name] for name in ("sft", "half", "shuffled"))
    assert taught[0] < sft[0] - 0.02
    assert floor < taught[1] < sft[1] - 0.01, "not by less overfitting alone"
    assert shuffled[1] > sft[1] + 0.005, "not by softer targets alone"
    # What makes it a case: numbers are fewer tokens of the pivot than of the source.
    data = TokenDataset(tmp_path / "seed-0" / "data" / "train")
    targets = SoftTargetStore(tmp_path / "seed-0" / "targets" / "source")
    lengths = data.scored_lengths[:, 0].tolist()
    cut = [len(targets.take(index, 0, length).chunks) for index, length in enumerate(lengths)]
    assert sum(count > 0 for count in cut) > 0.9 * len(cut)
