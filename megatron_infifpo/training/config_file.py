"""A run's flags in a YAML file, as words of a command line."""

import argparse
import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.yaml_files import read_yaml

CONFIG = "--config"
# What is for a command line alone.
_NOT_IN_FILES = (CONFIG, "--help", "-h", "--environment")


def with_file(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Put the flags of `--config FILE` before the words, so that these have the last say.

    Raises:
        UserError: the file cannot be read, names no flag of the parser or one twice, or has a value
            that cannot be; or there are two files.
    """
    first = argparse.ArgumentParser(parser.prog, add_help=False, allow_abbrev=False)
    first.add_argument(CONFIG, action="append", default=[])
    found, rest = first.parse_known_args(words)
    if len(found.config) > 1:
        raise UserError(f"--config is given twice, {' and '.join(found.config)}: expected one file")
    return [word for path in found.config for word in file_words(parser, Path(path))] + rest


def file_words(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """Read a file of flags by name, with dashes or underscores; errors as `with_file`."""
    try:
        content = read_yaml(path, texts=True, same=_key)
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds no flags: expected `name: value`, one a line")
    options = {
        _key(option): (option, action)
        for option, action in parser._option_string_actions.items()
        if option not in _NOT_IN_FILES
    }
    words = []
    for name, value in content.items():
        if _key(str(name)) not in options:
            near = difflib.get_close_matches(_key(str(name)), options, 3)
            choices = ", ".join(key.replace("_", "-") for key in near)
            raise UserError(
                f"--config {path}: {name} is no flag of a run, expected "
                f"{choices or 'one'} of infifpo train --help"
            )
        words += _words(*options[_key(str(name))], value, f"--config {path}: {name} is {value!r}")
    trial = copy.copy(parser)  # which tells of a bad word of the file, where a command would exit
    trial.exit_on_error = False
    try:
        trial.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise UserError(f"--config {path}: {error}") from None
    return words


def _key(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _words(option: str, action: argparse.Action, value: Any, what: str) -> list[str]:
    """Words that give a flag its value; none for null, and for false where that is all."""
    if action.nargs == 0:
        if not isinstance(value, bool | None):
            raise UserError(f"{what}, expected true or false: the flag takes no value")
        negative = f"--no-{option.removeprefix('--')}"
        if value is False and negative in action.option_strings:
            return [negative]
        return [option] if value else []
    if isinstance(value, bool | dict) or (isinstance(value, list) and action.nargs is None):
        raise UserError(f"{what}, expected a {'value' if action.nargs is None else 'list'}")
    if value is None:
        return []
    return [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"]
