"""The pages that `--help` prints, one a command: `python -m megatron_infifpo.commands.help`.

They lie beside this file, so that no command is imported, with PyTorch and Megatron, to say what
its flags are. A test compares them with the parsers.
"""

import argparse
import importlib
import textwrap

from megatron_infifpo.commands.main import COMMANDS, STAGES, make_parser, megatron_line

_HEAD = """\
usage: infifpo COMMAND ...

InfiFPO on Megatron: preference optimization of a pivot model against fused source models.
"""
_END = """
`infifpo COMMAND --help` explains one; `infifpo --version` prints the version. Where the command is
not on PATH, and for launchers that want a module, `python -m megatron_infifpo COMMAND` is the same.
"""


def make_pages() -> dict[str, str]:
    """All pages, by name."""
    pages = {"infifpo": overview()}
    for name in COMMANDS:
        pages |= pages_of(name)
    return pages


def pages_of(name: str) -> dict[str, str]:
    """The pages of a command, and of those in it, by name."""
    _, parser = make_parser(name)
    pages = {name: parser.format_help()}
    if name == "train":
        pages[name] += f"\n{megatron_line()}"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            pages |= {f"{name}-{inner}": p.format_help() for inner, p in action.choices.items()}
    return pages


def overview() -> str:
    """The page of `infifpo` itself."""
    lines = [_HEAD]
    for stage, names in STAGES.items():
        lines.append(f"{stage}:")
        for name in names:
            what = (importlib.import_module(COMMANDS[name]).__doc__ or "").splitlines()[0]
            line = f"  {name:<16}  {what}"
            filled = textwrap.fill(line, 100, subsequent_indent=" " * 20, break_on_hyphens=False)
            lines.append(filled)
        lines.append("")
    return "\n".join(lines).rstrip() + "\n" + _END
