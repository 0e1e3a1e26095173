"""The installed command: `infifpo NAME ...`, also `python -m megatron_infifpo NAME ...`.

A command is a module of this folder. Its docstring is what `--help` says, with one line first that
tells what it does; `add_arguments(parser)` adds its flags and `run(args)` does the work. Where a
command line is not simply what `parse_args` makes of it, `parse(parser, words)` does that.

Help comes from stored pages (see `help`), so that nobody waits for the imports of a command.
"""

import argparse
import difflib
import importlib
import keyword
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_infifpo import __version__
from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError

# What is done one after the other, in this order.
STAGES: dict[str, tuple[str, ...]] = {
    "A whole run, of one file": ("init", "show", "fuse", "status"),
    "From prompts to preference pairs": ("sample", "label", "split"),
    "Checkpoints": ("import", "export", "merge", "describe", "verify", "bridge-config"),
    "What training reads": (
        "prepare",
        "score",
        "import-logprobs",
        "fuse-targets",
        "inspect",
        "check",
    ),
    "Training, and what came of it": ("train", "rounds", "report", "evaluate"),
    "Clusters and machines": ("plan", "launch", "environment", "gpu-check", "completion"),
    "Evidence": ("study",),
}
# Name -> module.
COMMANDS = {
    name: f"megatron_infifpo.commands.{name.replace('-', '_')}{'_' * keyword.iskeyword(name)}"
    for names in STAGES.values()
    for name in names
}
PAGES = Path(__file__).with_name("help")
HELP = ("-h", "--help")


class WideFormatter(argparse.RawDescriptionHelpFormatter):
    """Texts of 100 columns, whatever the terminal has."""

    def __init__(self, prog: str, **options: Any) -> None:
        """Take the width that the stored pages have."""
        super().__init__(prog, **(options | {"width": 100}))


class CommandParser(argparse.ArgumentParser):
    """Parser of a command, and of the commands in it."""

    def __init__(self, **options: Any) -> None:
        """Show the description as it is written."""
        super().__init__(**({"formatter_class": WideFormatter} | options))

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Flags that begin so: one with two spellings is one flag."""
        found = super()._get_option_tuples(option_string)
        return list({id(action): match for match in found for action in match[:1]}.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Run `infifpo` with these words, or those of the command line, and exit."""
    words = sys.argv[1:] if argv is None else list(argv)
    run(lambda: run_words(words))


def run_tool(commands: str | Mapping[str, str]) -> None:
    """Run a command under its old name in tools/, and exit.

    Args:
        commands: its name; or names by the first word that chooses between them.
    """
    if isinstance(commands, str):
        return main([commands, *sys.argv[1:]])
    first, *rest = sys.argv[1:] or [""]
    if first in commands:
        return main([commands[first], *rest])
    usage = f"usage: {Path(sys.argv[0]).name} {' | '.join(commands)} ...; each has --help"
    print(usage, file=sys.stdout if first in HELP else sys.stderr)
    sys.exit(0 if first in HELP else 2)


def run_words(words: Sequence[str]) -> int | None:
    """Run what `infifpo WORDS` asks for; return its exit code.

    Raises:
        UserError: there is no such command, or it cannot do what is asked.
    """
    name, *rest = words or [""]
    if name in ("", *HELP):
        print(read_page("infifpo"), end="", file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if name == "--version":
        print(f"megatron_infifpo {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 3, 0.5) or COMMANDS
        raise UserError(f"there is no command {name!r}: expected {', '.join(near)}, or --help")
    if any(flag in rest for flag in HELP) and (page := read_help(name, rest)):
        print(page, end="")
        return 0
    return run_command(name, rest)


def run_command(name: str, words: Sequence[str]) -> int | None:
    """Run one command; return its exit code."""
    module, parser = make_parser(name)
    parse = getattr(module, "parse", argparse.ArgumentParser.parse_args)
    result: int | None = module.run(parse(parser, list(words)))
    return result


def make_parser(name: str) -> tuple[ModuleType, CommandParser]:
    """Import a command, and make its parser."""
    module = importlib.import_module(COMMANDS[name])
    parser = CommandParser(prog=f"infifpo {name}", description=module.__doc__)
    module.add_arguments(parser)
    return module, parser


def read_help(name: str, words: Sequence[str]) -> str | None:
    """The stored page of a command, or of the command in it that the first word names.

    None where Megatron is not the version whose flags the page has.
    """
    inner = f"{name}-{words[0]}"
    page = read_page(inner if inner in {path.stem for path in PAGES.glob("*.txt")} else name)
    return page if name != "train" or megatron_line() in page else None


def read_page(name: str) -> str:
    """A page of `help`."""
    return (PAGES / f"{name}.txt").read_text(encoding="utf-8")


def megatron_line() -> str:
    """What the page of `train` says of the Megatron that is installed."""
    from importlib.metadata import version  # takes longer than all else here

    return f"Megatron's flags are those of megatron-core {version('megatron-core')}.\n"
