"""Ask of given arguments which of Megatron's flags cannot be, and why."""

import argparse
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.megatron_flags.conditions import CHOICES, CONFLICTS, NEEDS
from megatron_infifpo.megatron_flags.group import DEVICE, GPU, REFUSED
from megatron_infifpo.megatron_flags.model import MODEL
from megatron_infifpo.megatron_flags.running import RUNNING
from megatron_infifpo.patches import cpu

GROUPS = MODEL | RUNNING
# Other characters become question marks.
_ASCII = str.maketrans({"—": "-", "–": "-", "…": "...", "‘": "'", "’": "'", "“": '"', "”": '"'})
_NEW = "it is not in the table of Megatron's flags (megatron_infifpo/megatron_flags)"
_ON_CPU = "it is for GPUs, and this run is on a CPU"


class _RefuseYaml(argparse.Action):
    """Stops parsing: with this flag Megatron would put other arguments in the place of all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        """Raise UserError."""
        raise UserError(f"--yaml-cfg {refusal('experimental', 'yaml_cfg', values)}")


def mend(parser: argparse.ArgumentParser) -> None:
    """Make a parser with Megatron's flags fit to be used.

    `--yaml-cfg` is refused where it is read, as long as there are arguments to check. Some help
    texts hold a lone percent sign, or what not every terminal can print; some values that cannot be
    would end in a traceback.
    """
    parser._option_string_actions["--yaml-cfg"] = _RefuseYaml(["--yaml-cfg"], "yaml_cfg")
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if action.help and not action.help.isascii():
            action.help = action.help.translate(_ASCII).encode("ascii", "replace").decode()
        try:
            if action.help:
                formatter._expand_help(action)
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%") if action.help else None
        if getattr(action.type, "__module__", "").startswith("megatron."):
            assert callable(action.type)
            action.type = _reader(action.type, action.choices)


def _reader(kind: Callable[[str], Any], choices: Iterable[Any] | None) -> Callable[[str], Any]:
    """Read a value as `kind` does, and refuse one that it has no sentence for."""

    @functools.wraps(kind)
    def read(text: str) -> Any:
        try:
            return kind(text)
        except (KeyError, NameError, SyntaxError):
            names = [each.name if isinstance(each, Enum) else str(each) for each in choices or ()]
            expected = f"expected one of {', '.join(names)}" if names else "which it cannot be"
            raise argparse.ArgumentTypeError(f"{text!r}, {expected}") from None

    return read


def flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Yield title of the group and action of every flag of Megatron's, in the order of `--help`."""
    for group in parser._action_groups:
        if group.title in GROUPS:
            for action in group._group_actions:
                yield group.title, action


def spelling(parser: argparse.ArgumentParser, name: str, value: Any) -> str:
    """Return the option that sets an argument to a value, as it is on the command line."""
    actions = [action for action in parser._actions if action.dest == name]
    for action in actions:
        if action.nargs != 0 or action.const == value:
            return action.option_strings[0]
    # --feature and --no-feature
    return actions[0].option_strings[0 if value else -1]


def defaults(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Defaults by name, as parsing gives them: not all are `parser.get_default`'s.

    That skips a None where two flags share a name.
    """
    return {action.dest: action.default for action in reversed(parser._actions)}


def unsupported(given: Mapping[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Say in a sentence each which flags, or values, or combinations of flags do not work.

    Args:
        given: values of all flags by name, as parsed.
        parser: Megatron's, with flags of ours or without.
    """
    as_parsed = defaults(parser)
    working: dict[str, str] = {}  # name -> spelling
    sentences: dict[str, str] = {}
    for title, action in flags(parser):
        name, value = action.dest, given.get(action.dest)
        if value == as_parsed[name]:
            continue
        option = spelling(parser, name, value)
        why = refusal(title, name, value)
        if why is None:
            working[name] = option
        else:
            sentences[name] = f"{option} {why}"
    found = list(sentences.values())
    for need in NEEDS:
        useless = [working[name] for name in need.names.split() if name in working]
        if useless and not need.holds(given):
            verb, it = ("has", "it") if len(useless) == 1 else ("have", "them")
            options = " and ".join(useless)
            found.append(f"{options} {verb} no effect without {need.what}: leave {it} out")
    return found + [conflict.message for conflict in CONFLICTS if conflict.holds(given)]


def refusal(group: str, name: str, value: Any) -> str | None:
    """Why a flag that was given is refused, as what follows it in a sentence; None if it is not.

    Args:
        group: title of its group, a key of `GROUPS`.
        name: of the argument.
        value: what it was given, not its default.
    """
    if cpu.is_enabled() and name in cpu.argument_overrides():
        return None  # the program sets it, and refuses another value
    kind, why = GROUPS[group].classify(name) or (REFUSED, _NEW)
    if kind == GPU and cpu.is_enabled():
        kind, why = REFUSED, _ON_CPU
    if kind in (REFUSED, DEVICE):
        return f"is not supported: {why}; leave it out"
    if name in CHOICES:
        allowed, why = CHOICES[name]
        values = value if isinstance(value, list) else [value]
        names = [each.name if isinstance(each, Enum) else str(each) for each in values]
        bad = [each for each in names if each not in allowed.split()]
        if bad:
            return f"{' '.join(bad)} is not supported: {why}; expected {allowed.replace(' ', ', ')}"
    return None
