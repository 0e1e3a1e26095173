"""The programs in tools/ and modules with a command line, run in this process."""

import importlib.util
import runpy
import sys
from collections.abc import Callable
from types import ModuleType
from unittest import mock

from support.launcher import ROOT


def export(checkpoint: str, folder: str) -> None:
    """Run `python tools/convert_checkpoint.py export` as one rank."""
    run_tool("convert_checkpoint", ["export", "--load", checkpoint, "--save", folder])


def run_command(*words: str) -> None:
    """Run `infifpo WORDS` as its command line does, but raise its errors."""
    from megatron_infifpo.commands.main import run_words

    run_words(list(words))


def load_tool(name: str) -> ModuleType:
    """Import a file in tools/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, argv: list[str]) -> int | None:
    """Run a file in tools/ as its command line does, but raise its errors; return its exit code."""
    from megatron_infifpo.commands import entry
    from megatron_infifpo.commands import main as commands

    codes = []

    def call(main: Callable[[], int | None]) -> None:
        codes.append(main())

    sys.argv = [name, *argv]
    with mock.patch.object(entry, "run", call), mock.patch.object(commands, "run", call):
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    return codes[0]


def command(program: str, argv: list[str]) -> None:
    """Run a program (a module, or tools/NAME.py) as its command line does, exit code included."""
    sys.argv = [program, *argv]
    if program.startswith("tools/"):
        # As Python does with a script's folder.
        with mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__")
