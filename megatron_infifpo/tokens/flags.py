"""Flags of the tools that read preference records and tokenize them."""

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.flags import add_record_flags as add_record_flags
from megatron_infifpo.tokens.rendering import REASONING, SCORE
from megatron_infifpo.tokens.tokenization import ChatTokenizer

# A reply that is the last message ends with the end of text, as base models have seen it.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if loop.last and message['role'] == 'assistant' else '\\n\\n' }}{% endfor %}"
)


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
            default="last",
            help="the assistant's messages after the user's last one, or all of the conversation "
            "(default: last)",
        )
        parser.add_argument(
            "--score-reasoning",
            choices=REASONING,
            default="auto",
            help="whether a reply's reasoning is scored; auto: where the chat template writes "
            "reasoning of its own (default: auto)",
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
        path,
        template=template,
        options=read_options(args.chat_template_options),
        score=getattr(args, "score", "last"),
        reasoning=getattr(args, "score_reasoning", "auto"),
        trust_remote_code=args.trust_remote_code,
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
