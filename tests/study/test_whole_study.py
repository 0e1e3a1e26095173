"""A study of a few steps, from untrained models to a report, and again from where it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.launcher import ROOT

SETTINGS = """
sets: 1
tuning_seeds: [100]
prompts: {sft: 40, preference: 40, verification: 15, heldout: 30, log_odds: 12}
pretraining: {texts: 120, steps: 3, pivot_steps: 3, batch: 16, lr: 1.0e-3}
sft: {epochs: 1, batch: 8, lr: 1.0e-3}
training: {epochs: 1, batch: 8, lr: 1.0e-3}
explained: 1
conditions:
  noisy:
    words: noisy
    judge: noise25
    sources: [generalist, sums-expert]
    seeds: 1
    methods: [sft, shuffled, infifusion, pad]
methods:
  sft: {words: SFT}
  shuffled: {words: shuffled, flags: --method infifpo, control: shuffled}
  infifusion:
    words: InfiFusion
    flags: --method infifusion
    targets: --fusion none
    sources: [generalist]
  pad: {words: PAD, flags: --method pad, data: lists}
report: {main: noisy, baseline: sft, ceiling: shuffled}
"""


def study(*words: object) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "megatron_infifpo", "study"]
    ran = subprocess.run(
        [*command, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.timeout(900)
def test_from_untrained_models_to_a_report(tmp_path: Path):
    settings, output = tmp_path / "study.yaml", tmp_path / "out"
    settings.write_text(SETTINGS)
    flags = ("--settings", settings, "--output", output)
    assert "4 runs" in study("run", *flags)
    results = output / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    found = {row["method"]: row for row in rows}
    assert len(found) == len(rows) == 4
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and 0 <= row["neither"] <= 1
    start, end = (found["shuffled"]["why"][when] for when in ("start", "end"))
    assert start["drift"] == 0 != end["drift"]
    assert start["coefficient"] >= 0.5  # clipped, a reference can only ask for more
    # What is lost is made again, from the same seeds to the same numbers; the rest is not.
    kept = [row for row in rows if row["method"] != "infifusion"]
    results.write_text("".join(json.dumps(row) + "\n" for row in kept))
    study("run", *flags)
    *others, again = (json.loads(line) for line in results.read_text().splitlines())
    assert others == kept
    assert again | {"seconds": 0} == found["infifusion"] | {"seconds": 0}
    study("report", *flags[:2], "--results", results, "--output", tmp_path)
    assert "PAD" in (tmp_path / "report.md").read_text()
