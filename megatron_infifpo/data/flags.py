"""Flags of the tools that read preference records and tokenize them."""

import argparse
import sys
from pathlib import Path

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.records import ON_BAD
from megatron_infifpo.data.tokenization import ChatTokenizer

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\\n\\n' }}{% endfor %}"
)


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which records to read."""
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="preference records, in order"
    )
    parser.add_argument(
        "--on-bad-record",
        choices=ON_BAD,
        default="error",
        help="stop at the first malformed record, or leave such records out, then in every "
        "command (default: error)",
    )


def add_tokenizer_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say how a tokenizer is used."""
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="Jinja chat template to use in place of the tokenizer's own, or 'plain': texts "
        "joined by blank lines, for a base model (default: the tokenizer's)",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def open_tokenizer(path: str | Path, args: argparse.Namespace) -> ChatTokenizer:
    """Load a tokenizer as `add_tokenizer_flags` describes.

    Raises:
        UserError: nothing loadable, no template, or an unreadable one.
    """
    template = args.chat_template
    if template == "plain":
        template = PLAIN_TEMPLATE
    elif template is not None:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read --chat-template {args.chat_template} ({error}), expected a Jinja "
                "file or 'plain'"
            ) from None
    return ChatTokenizer.from_pretrained(
        path, template=template, trust_remote_code=args.trust_remote_code
    )


def report_skipped(skipped: list[str]) -> None:
    """Print what was left out: every message of a few, the first ones of many."""
    if not skipped:
        return
    print(f"skipped {len(skipped)} bad records:", file=sys.stderr)
    for message in skipped[:20]:
        print(f"  {message}", file=sys.stderr)
    if len(skipped) > 20:
        print(f"  ... and {len(skipped) - 20} more", file=sys.stderr)
