"""How a tokenizer is used: the options, and a tokenizer opened with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_choice, check_types
from megatron_infifpo.tokens.rendering import REASONING, SCORE
from megatron_infifpo.tokens.tokenization import ChatTokenizer

# A reply that is the last message ends with the end of text, as base models have seen it.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{{ eos_token if loop.last and message['role'] == 'assistant' else '\\n\\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class TokenizerOptions:
    """How a tokenizer is used, and what of a reply is scored; fields named as the flags.

    Attributes:
        chat_template: a Jinja file to use in place of the tokenizer's own template, or "plain":
            texts joined by blank lines, for a base model.
        chat_template_options: variables for the template, such as `{"enable_thinking": False}`.
        score: "last": the assistant's messages after the user's last one; "all": every one.
        score_reasoning: whether a reply's reasoning is scored: "yes", "no", or "auto": where the
            template writes reasoning of its own.
        trust_remote_code: run code that comes with the model.
    """

    chat_template: str | None = None
    chat_template_options: Mapping[str, Any] = field(default_factory=dict)
    score: str = "last"
    score_reasoning: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the tokenizer.

        Raises:
            UserError: an unknown choice.
        """
        check_choice("score", self.score, SCORE)
        check_choice("score_reasoning", self.score_reasoning, REASONING)
        check_types(self)


def open_tokenizer(path: str | Path, options: TokenizerOptions) -> ChatTokenizer:
    """Load a tokenizer.

    Raises:
        UserError: nothing loadable, no template, or an unreadable one.
    """
    template = options.chat_template
    if template == "plain":
        template = PLAIN_TEMPLATE
    elif template is not None:
        try:
            template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"cannot read --chat-template {options.chat_template} ({error}), expected a Jinja "
                "file or 'plain'"
            ) from None
    return ChatTokenizer.from_pretrained(
        path,
        template=template,
        options=options.chat_template_options,
        score=options.score,
        reasoning=options.score_reasoning,
        trust_remote_code=options.trust_remote_code,
    )
