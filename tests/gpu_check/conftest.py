"""Groups of checks for tests are found by the processes that run them."""

import os

import pytest

from support.launcher import ROOT


@pytest.fixture(autouse=True)
def groups_to_import(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
