"""The programs in tools/ and modules with a command line, run in this process."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from support.launcher import ROOT


def export(checkpoint: str, folder: str) -> None:
    """Run `python tools/convert_checkpoint.py export` as one rank."""
    run_tool("convert_checkpoint", ["export", "--load", checkpoint, "--save", folder])


def load_tool(name: str) -> ModuleType:
    """Import a file in tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, argv: list[str]) -> None:
    """Run the main of a file in tools/ as one rank."""
    sys.argv = [name, *argv]
    load_tool(name).main()


def command(program: str, argv: list[str]) -> None:
    """Run a program (a module, or tools/NAME.py) as its command line does, exit code included."""
    from megatron_infifpo.commands.entry import run

    is_tool = program.startswith("tools/")
    module = load_tool(Path(program).stem) if is_tool else importlib.import_module(program)
    sys.argv = [program, *argv]
    run(module.main)
