"""Flags that several commands have, and what is made of them."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive, whole
from megatron_infifpo.records.records import ON_BAD
from megatron_infifpo.tokens.options import TokenizerOptions
from megatron_infifpo.tokens.rendering import REASONING, SCORE


def fields_of(args: argparse.Namespace, job: type) -> dict[str, Any]:
    """Return the fields of a job, a dataclass, that a command line has."""
    names = {field.name for field in dataclasses.fields(job)}
    return {name: value for name, value in vars(args).items() if name in names}


def take_defaults(parser: argparse.ArgumentParser, job: type) -> None:
    """Give the flags that are added so far the defaults that a job's fields have."""
    flags = {action.dest for action in parser._actions}
    fields = [field for field in dataclasses.fields(job) if field.name in flags]
    given = {field.name: field.default for field in fields}
    parser.set_defaults(
        **{name: value for name, value in given.items() if value is not dataclasses.MISSING}
    )


def hidden_alias(parser: argparse.ArgumentParser, other: str, flag: str) -> None:
    """Take another spelling of a flag as well, without showing it: the old one, or Megatron's."""
    parser._option_string_actions[other] = parser._option_string_actions[flag]


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which tokens and log-probs to read, as training has them, too."""
    parser.add_argument("--data", required=True, metavar="PREFIX", help="of the token dataset")
    parser.add_argument("--sources", metavar="FILE", help="sources.yaml; without it only tokens")
    parser.add_argument(
        "--soft-targets", metavar="PREFIX", help="of these tokens, written by infifpo fuse-targets"
    )
    for flag in ("data", "sources"):
        hidden_alias(parser, f"--preference-{flag}", f"--{flag}")


def add_expert_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how experts are spread over the ranks that compute a row together."""
    parser.add_argument(
        "--expert-model-parallel-size", type=positive, metavar="N",
        help="ranks that share the experts of a layer, of those that compute a row together "
        "(tensor x context parallel size)",
    )  # fmt: skip
    parser.add_argument(
        "--expert-tensor-parallel-size", type=positive, metavar="N",
        help="ranks that share each of them (default: 1, whatever the tensor-parallel size)",
    )  # fmt: skip


def add_record_flags(parser: argparse.ArgumentParser, *, lists: bool = True) -> None:
    """Add the flags that say which records to read, and with `lists` how rated ones are."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE",
        help="preference records, in order: .jsonl, .json, .csv (also .gz, .zst), .parquet, or "
        "folders that datasets saved (docs/file-formats.md)",
    )
    parser.add_argument(
        "--on-bad-record",
        choices=ON_BAD,
        default=ON_BAD[0],
        help="stop at the first malformed record, or leave such records out, then in every "
        "command (default: %(default)s)",
    )
    if lists:
        parser.add_argument(
            "--lists",
            action="store_true",
            help="where records rate several responses read all of them, as a list with scores; "
            "in every command or in none (default: the best and the worst, as a pair)",
        )


def read_folders(flag: str, texts: Sequence[str]) -> dict[str, str]:
    """Read NAME=DIR; returns the folders by name, in order.

    Args:
        flag: that has them.
        texts: its words.

    Raises:
        UserError: not of that form, or a name twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise UserError(f"{flag} {text}: expected NAME=DIR")
        if name in found:
            raise UserError(
                f"{flag} {name} is given twice, for {found[name]} and for {folder}: expected "
                "names that differ"
            )
        found[name] = folder
    return found


def add_tokenizer_flags(parser: argparse._ActionsContainer, *, scored: bool = True) -> None:
    """Add the flags that say how a tokenizer is used, and what of a reply is scored."""
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja chat template to use in place of the tokenizer's own, or 'plain': texts "
        "joined by blank lines, for a base model (default: the tokenizer's)",
    )
    parser.add_argument(
        "--chat-template-options",
        metavar="JSON",
        help="variables for the template, such as '{\"enable_thinking\": false}'; a record's "
        "chat_template_kwargs go before them",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    if scored:
        parser.add_argument(
            "--score",
            choices=SCORE,
            default=TokenizerOptions.score,
            help="the assistant's messages after the user's last one, or all of the conversation "
            "(default: %(default)s)",
        )
        parser.add_argument(
            "--score-reasoning",
            choices=REASONING,
            default=TokenizerOptions.score_reasoning,
            help="whether a reply's reasoning is scored; auto: where the chat template writes "
            "reasoning of its own (default: %(default)s)",
        )


def add_server_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say where a server is, and how it is asked."""
    parser.add_argument("--server", metavar="URL", help="such as http://localhost:8000/v1")
    parser.add_argument("--server-key-file", metavar="FILE", help="holds the server's key")
    parser.add_argument("--server-requests", type=positive, help="at once (default: %(default)s)")
    parser.add_argument("--server-timeout", type=float, help="s (default: %(default)g)")
    parser.add_argument(
        "--server-retries", type=whole(0), help="of a request that fails (default: %(default)s)"
    )


def tokenizer_options(args: argparse.Namespace) -> TokenizerOptions:
    """Return what `add_tokenizer_flags` read.

    Raises:
        UserError: --chat-template-options is not a JSON object.
    """
    options = read_options(args.chat_template_options)
    return TokenizerOptions(
        **fields_of(args, TokenizerOptions) | {"chat_template_options": options}
    )


def read_options(text: str | None) -> dict[str, Any]:
    """Read the value of --chat-template-options.

    Raises:
        UserError: it is not a JSON object.
    """
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        found = error
    if not isinstance(found, dict):
        reason = found if isinstance(found, Exception) else f"{type(found).__name__} found"
        raise UserError(
            f"--chat-template-options is {text!r} ({reason}), expected a JSON object such as "
            "'{\"enable_thinking\": false}'"
        )
    return found
