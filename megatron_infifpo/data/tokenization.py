"""Chat tokenization: prompt ids and response ids with the boundary in token space.

The prompt is what the chat template renders with its generation prompt. A response is its text plus
the end of the turn, tokenized on its own, so that no token ever spans the boundary and the prompt's
ids do not depend on the response.
"""

import datetime
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.hf_tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_infifpo.data.records import Message, PreferenceRecord

# Plain letters: no template trims, escapes or splits them.
_REPLY = "INFIFPOREPLY"
_SYSTEM = "INFIFPOSYSTEM"
_USER: Message = {"role": "user", "content": "INFIFPOQUESTION"}

# What templates that print today's date (Llama 3, Mistral) print: prompts must not change by night.
TODAY = datetime.date(2025, 1, 1)
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


class RefusedPromptError(UserError):
    """A chat template refuses a record's prompt."""


@dataclass(frozen=True, slots=True)
class TokenizedRecord:
    """Token ids of one record.

    Attributes:
        prompt_ids: int32 `[P]`, ends with the generation prompt; never scored.
        response_ids: int32 `[L_r]` for each response in `RESPONSES` order; each ends with the end
            of the turn, which is scored and counted like every other token.
        scored: bool `[L_r]` for each response, which of its tokens are scored; None: all are.
    """

    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...] | None = None


class ChatTokenizer:
    """A Hugging Face tokenizer and what its chat template does around a reply.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        path: where it came from.
        end_of_turn: text that ends a reply, such as "<|im_end|>".
        end_of_turn_ids: its token ids.
    """

    def __init__(self, tokenizer: Any, path: str = "", *, template: str | None = None) -> None:
        """Learn the reply's surroundings from the template.

        Args:
            tokenizer: the Hugging Face tokenizer.
            path: where it came from.
            template: a Jinja chat template to use in place of the tokenizer's own.

        Raises:
            UserError: there is no chat template, or it does not render a user and a reply.
        """
        self.tokenizer, self.path, self._given_template = tokenizer, path, template
        if template:
            tokenizer.chat_template = template
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {path} has no chat template; take the tokenizer of the "
                "instruction-tuned model, or choose a template with --chat-template: a Jinja "
                "file, or 'plain' for a base model (texts joined by blank lines, no roles)"
            )
        tokenizer.chat_template = _DATE.sub(
            lambda call: repr(TODAY.strftime(call[2])), self._template()
        )
        self._folds_system = not self._renders_system()
        rendered = self._render([_USER, _reply(_REPLY)], what="a user message and a reply")
        padded = self._render([_USER, _reply(f" \n{_REPLY}\n ")], what="a reply")
        if _REPLY not in rendered or _REPLY not in padded:
            raise UserError(
                f"the chat template of {path} does not print the assistant's reply, expected the "
                "reply and an end of turn"
            )
        # A template that trims replies never shows the model outer white space: trim it as well.
        self._trims_left = f" \n{_REPLY}" not in padded
        self._trims_right = f"{_REPLY}\n " not in padded
        self._prompt_tail, self._lead = self._between_prompt_and_reply(rendered)
        self.end_of_turn = self._first_special(rendered.split(_REPLY, 1)[1])
        self.end_of_turn_ids = self._ids([self.end_of_turn])[0]

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, template: str | None = None, trust_remote_code: bool = False
    ) -> "ChatTokenizer":
        """Load a tokenizer folder; see `__init__` for the template.

        Raises:
            UserError: nothing loadable is there, or it has no chat template.
        """
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return cls(tokenizer, str(path), template=template)

    @classmethod
    def reopen(
        cls,
        description: dict[str, Any],
        path: str | None = None,
        *,
        trust_remote_code: bool = False,
    ) -> "ChatTokenizer":
        """Load the tokenizer that `describe` described, from `path` if it has moved.

        Raises:
            UserError: it is not there, or another one is.
        """
        path = path or description["path"]
        tokenizer = cls.from_pretrained(
            path, template=description["chat_template"], trust_remote_code=trust_remote_code
        )
        for name, found in tokenizer.fingerprint().items():
            if found != description[name]:
                raise UserError(
                    f"the tokenizer {path} has {name} {found[:12]}, expected "
                    f"{description[name][:12]}: give the one that was used"
                )
        return tokenizer

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says about the tokenizer and the template."""
        return {
            "path": str(Path(self.path).resolve()) if self.path else "",
            **self.fingerprint(),
            "chat_template": self._given_template,
            "end_of_turn": self.end_of_turn,
            "system_message": "joined to the user's" if self._folds_system else "by the template",
        }

    def encode(self, record: PreferenceRecord) -> TokenizedRecord:
        """Tokenize one record; nothing is truncated.

        Raises:
            UserError: the chat template refuses the prompt.
        """
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[PreferenceRecord]) -> list[TokenizedRecord]:
        """Tokenize records; fast tokenizers use several threads here."""
        prompt_ids = self.prompt_ids([(record.prompt, record.id) for record in records])
        texts = [
            self._response_text("".join(message["content"] for message in response))
            for record in records
            for response in record.responses
        ]
        response_ids = iter(self._text_ids(texts))
        return [
            TokenizedRecord(
                np.asarray(ids, dtype=np.int32),
                tuple(
                    np.asarray(next(response_ids) + self.end_of_turn_ids, dtype=np.int32)
                    for _ in record.responses
                ),
            )
            for record, ids in zip(records, prompt_ids, strict=True)
        ]

    def prompt_ids(self, prompts: Sequence[tuple[Iterable[Message], str]]) -> list[list[int]]:
        """Tokenize prompts, given with the ids of their records, up to the generation prompt.

        Raises:
            UserError: the chat template refuses one.
        """
        texts = [self.render_prompt(messages, record_id) for messages, record_id in prompts]
        return [self._without_second_bos(ids) for ids in self._ids(texts)]

    def render_prompt(self, messages: Iterable[Message], record_id: str = "") -> str:
        """Return the prompt's text, up to and including the generation prompt."""
        folded = fold_system(messages) if self._folds_system else list(messages)
        return self._render(folded, generate=True, what=f"record {record_id!r}") + self._prompt_tail

    def fingerprint(self) -> dict[str, str]:
        """Return sha256 identities: vocabulary with merges and normalisers, and chat template."""
        return dict(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return {
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
            "chat_template_sha256": hashlib.sha256(self._template().encode()).hexdigest(),
        }

    def _template(self) -> str:
        """Return the text of the template for plain chats."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            template = self.tokenizer.get_chat_template()
        return template

    def _render(self, messages: Sequence[Message], *, what: str, generate: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generate,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RefusedPromptError(
                f"the chat template of {self.path} refuses {what} ({error}), expected messages "
                "that it can render"
            ) from None

    def _renders_system(self) -> bool:
        """Whether the template prints a system message (Gemma's raises, others drop it)."""
        try:
            return _SYSTEM in self._render(
                [{"role": "system", "content": _SYSTEM}, _USER], what="a system message"
            )
        except UserError:
            return False

    def _between_prompt_and_reply(self, rendered: str) -> tuple[str, str]:
        """What the template puts between its generation prompt and a reply: (for prompt, reply).

        Text there, such as an empty thinking block, was written by the template: it belongs to the
        prompt. White space (Llama 2's blank after [/INST]) is a part of the reply's first token.
        """
        prompt = self._render([_USER], what="a user message", generate=True)
        before = rendered.split(_REPLY, 1)[0]
        if not before.startswith(prompt):
            return "", ""
        gap = before[len(prompt) :]
        return ("", gap) if not gap.strip() else (gap, "")

    def _first_special(self, tail: str) -> str:
        """Cut what follows a reply after its first special token; else the end of text."""
        specials = {t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special}
        found = [(tail.index(s), -len(s), s) for s in specials if s in tail]
        if found:
            position, _, special = min(found)
            return tail[: position + len(special)]
        if self.tokenizer.eos_token is None:
            raise UserError(
                f"the chat template of {self.path} ends a reply with no special token and the "
                "tokenizer has no eos_token, expected one of them to end a turn"
            )
        return self.tokenizer.eos_token

    def _response_text(self, text: str) -> str:
        text = text.lstrip() if self._trims_left else text
        text = text.rstrip() if self._trims_right else text
        return self._lead + text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of text that the template wrote: its special tokens count, no BOS is added."""
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def _text_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of a response's text: what looks like a special token there is ordinary text."""
        anchor = "\n" if self._adds_blank else ""
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids = self.tokenizer([anchor + t for t in texts], **options)["input_ids"]
        if not anchor:
            return ids
        # Without the anchor, SentencePiece would put a blank before a reply that has none.
        skip = self.tokenizer([anchor], **options)["input_ids"][0]
        return [found[len(skip) :] if found[: len(skip)] == skip else found for found in ids]

    @cached_property
    def _adds_blank(self) -> bool:
        """Whether the tokenizer puts a blank before the text (SentencePiece's dummy prefix)."""
        first = self._ids(["a"])[0][0]
        return self.tokenizer.convert_ids_to_tokens(first).startswith("\u2581")

    def _without_second_bos(self, ids: list[int]) -> list[int]:
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def fold_system(messages: Iterable[Message]) -> list[Message]:
    """Put a leading system message before the first user message, for templates without one."""
    first, *rest = messages
    if first["role"] != "system" or not rest:
        return [first, *rest]
    joined = "\n\n".join(text for text in (first["content"], rest[0]["content"]) if text)
    return [{**rest[0], "content": joined}, *rest[1:]]
