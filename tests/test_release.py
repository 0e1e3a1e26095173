"""One version in all the places that name it."""

import re
from pathlib import Path

import yaml

from megatron_infifpo import __version__

ROOT = Path(__file__).resolve().parent.parent


def test_versions():
    """Between releases the package is ahead of what was released last."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    cited = citation["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dates = dict(re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)", changelog, re.MULTILINE))
    released = [*dates]
    if ".dev" not in __version__:
        assert cited == __version__
        assert released[:1] in ([], [__version__])  # none before the first
    elif released:
        assert cited == released[0]
    assert str(citation.get("date-released")) == dates.get(cited, "None")
