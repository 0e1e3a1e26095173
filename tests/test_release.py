"""One version in all the places that name it."""

import re
from pathlib import Path

import yaml

from megatron_infifpo import __version__

ROOT = Path(__file__).resolve().parent.parent


def test_versions():
    """Between releases the package is ahead of what was released last."""
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    if ".dev" not in __version__:
        assert cited == __version__
        assert released[:1] in ([], [__version__])  # none before the first
    elif released:
        assert cited == released[0]
