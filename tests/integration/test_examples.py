"""The demo's table of what fusing gains."""

import math
import re

import numpy as np
import pytest
import torch

from support.launcher import ROOT

DEMO = ROOT / "examples" / "demo"


def test_differences(monkeypatch, tmp_path, capsys):
    """The interval is over facts: two pairs of one fact that agree count once."""
    monkeypatch.syspath_prepend(str(DEMO))
    import island
    import table

    records = island.write_records(tmp_path)
    facts = np.array([fact for fact, _ in island.truth(records["heldout"])])
    gained = {"fused": facts % 4 != 0, "dpo": facts % 2 == 0}  # 75 % and 50 %
    means = {
        name: torch.tensor(np.stack([right, ~right], axis=1), dtype=torch.float64)
        for name, right in gained.items()
    }
    monkeypatch.setattr(table, "LogprobStore", lambda path: path.name)
    monkeypatch.setattr(table, "mean_logps", means.__getitem__)
    (tmp_path / "inputs").mkdir()
    records["heldout"].rename(tmp_path / "inputs" / "heldout.jsonl")
    table.print_differences(tmp_path, "fused", {"DPO": "dpo"})
    gain, low, high = map(float, re.findall(r"[+-]\d+\.\d", capsys.readouterr().out))
    assert gain == 25
    deviation = 100 * math.sqrt((0.5 + 0.25 - 0.25**2) / 24)  # of the mean over facts
    assert low == pytest.approx(gain - 1.96 * deviation, abs=4)
    assert high == pytest.approx(gain + 1.96 * deviation, abs=4)
