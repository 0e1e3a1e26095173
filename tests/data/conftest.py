"""Fixtures of the data tests."""

import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_infifpo.commands.entry import run

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool as its command line does; return (exit code, stdout, stderr)."""

    def call(name, *args):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            run(module.main)
        return (caught.value.code, *capsys.readouterr())

    return call
