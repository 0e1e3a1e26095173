"""The folder of a run."""

import pytest

from support.launcher import ROOT


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """The paper's sources in a run called `run`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    sources = (ROOT / "examples" / "phi4" / "sources.yaml").read_text()
    (tmp_path / "run" / "sources.yaml").write_text(sources)
    (tmp_path / "run" / "fusion").mkdir()
    (tmp_path / "run" / "fusion" / "sources.yaml").symlink_to("../sources.yaml")
    return tmp_path / "run"
