"""Chat tokenization: prompt ids and response ids with the boundary in token space.

`chat_template` learns what a template does, `rendering` says what of a record is prompt and what is
scored, and `text_ids` tokenizes it.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import Message, PreferenceRecord
from megatron_infifpo.tokens.chat_template import ChatTemplate, RefusedRecordError
from megatron_infifpo.tokens.hf_tokenizer import load_tokenizer, tokenizer_fingerprint
from megatron_infifpo.tokens.rendering import REASONING, SCORE, Renderer, Rendering, Reply
from megatron_infifpo.tokens.special_text import SpecialText
from megatron_infifpo.tokens.text_ids import TextIds
from megatron_infifpo.tokens.token_bytes import TokenBytes

__all__ = ["ChatTokenizer", "RefusedRecordError", "TokenizedRecord"]


@dataclass(frozen=True, slots=True)
class TokenizedRecord:
    """Token ids of one record.

    Attributes:
        prompt_ids: int32 `[P]`; never scored.
        response_ids: int32 `[L_r]` for each response in `RESPONSES` order; each ends with the end
            of the turn, if the template writes one.
        scored: bool `[L_r]` for each response: which tokens are scored and counted; None: all.
        notes: what is not as one would think, in words that fit every record of the kind.
    """

    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    scored: tuple[np.ndarray, ...] | None = None
    notes: tuple[str, ...] = ()


class ChatTokenizer:
    """A Hugging Face tokenizer with its chat template.

    Attributes:
        tokenizer: the Hugging Face tokenizer.
        path: where it came from.
        template: the chat template and its habits.
        end_of_turn: text that ends a reply, such as "<|im_end|>"; "" if there is none.
        end_of_turn_ids: its token ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: str = "",
        *,
        template: str | None = None,
        options: Mapping[str, Any] | None = None,
        score: str = "last",
        reasoning: str = "auto",
    ) -> None:
        """Learn the reply's surroundings from the template.

        Args:
            tokenizer: the Hugging Face tokenizer.
            path: where it came from.
            template: a Jinja chat template to use in place of the tokenizer's own.
            options: variables of the template, such as `enable_thinking`.
            score: "last": the assistant's messages after the user's last one; "all": every one.
            reasoning: whether reasoning is scored: "yes", "no", or "auto": by models whose
                template writes it.

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
        for name, value, known in (("score", score, SCORE), ("reasoning", reasoning, REASONING)):
            if value not in known:
                raise UserError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        self.template = ChatTemplate(tokenizer, path, options or {})
        self._special = SpecialText(tokenizer)
        self._renderer = Renderer(self.template, self._special, score, reasoning)
        self._text_ids = TextIds(tokenizer, self._special)
        self.end_of_turn = self.template.habits({}).end_of_turn
        self.end_of_turn_ids = self._text_ids.ids([self.end_of_turn])[0] if self.end_of_turn else []

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, trust_remote_code: bool = False, **choices: Any
    ) -> "ChatTokenizer":
        """Load a tokenizer folder; see `__init__` for the choices.

        Raises:
            UserError: nothing loadable is there, or it has no chat template.
        """
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        return cls(tokenizer, str(path), **choices)

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
            path,
            trust_remote_code=trust_remote_code,
            template=description["chat_template"],
            options=description["chat_template_options"],
            score=description["score"],
            reasoning=description["score_reasoning"],
        )
        for name, found in tokenizer.fingerprint().items():
            if found != description[name]:
                raise UserError(
                    f"the tokenizer {path} has {name} {found[:12]}, expected "
                    f"{description[name][:12]}: give the one that was used"
                )
        return tokenizer

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says about the tokenizer, the template and the rule."""
        habits = self.template.habits({})
        return {
            "path": str(Path(self.path).resolve()) if self.path else "",
            **self.fingerprint(),
            "chat_template": self._given_template,
            "chat_template_options": self.template.options,
            "score": self._renderer.score,
            "score_reasoning": self._renderer.reasoning,
            "end_of_turn": self.end_of_turn,
            "system_message": "joined to the user's" if habits.folds_system else "by the template",
            "generation_prompt_opens": habits.opens,
            "before_plain_replies": habits.lead,
            "reasoning": "by the template" if habits.writes_reasoning else "as text",
        }

    def encode(self, record: PreferenceRecord) -> TokenizedRecord:
        """Tokenize one record; nothing is truncated.

        Raises:
            RefusedRecordError: the chat template cannot render it, or rewrites it.
        """
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Sequence[PreferenceRecord]) -> list[TokenizedRecord]:
        """Tokenize records; fast tokenizers use several threads here.

        Raises:
            RefusedRecordError: the chat template cannot render one, or rewrites it.
        """
        rendered = [self._renderer.split(record) for record in records]
        prompt_ids = self._text_ids.prompts([rendering.prompt for rendering in rendered])
        pairs = [(r.prompt, reply.text) for r in rendered for reply in r.replies]
        replies = iter(self._text_ids.replies(pairs))
        found = []
        for rendering, ids in zip(rendered, prompt_ids, strict=True):
            response_ids = tuple(np.asarray(next(replies), np.int32) for _ in rendering.replies)
            marks = [
                self._text_ids.scored(rendering.prompt, reply, len(response))
                for reply, response in zip(rendering.replies, response_ids, strict=True)
            ]
            whole = all(mark.all() for mark in marks)
            found.append(
                TokenizedRecord(
                    np.asarray(ids, dtype=np.int32),
                    response_ids,
                    None if whole else tuple(marks),
                    rendering.notes,
                )
            )
        return found

    def render(self, record: PreferenceRecord) -> Rendering:
        """Return what is tokenized of a record, as text.

        Raises:
            RefusedRecordError: the chat template cannot render it, or rewrites it.
        """
        rendering = self._renderer.split(record)
        show = self._special.show
        shown = (
            Reply(
                show(reply.text),
                tuple(
                    (len(show(reply.text[:a])), len(show(reply.text[:b]))) for a, b in reply.scored
                ),
            )
            for reply in rendering.replies
        )
        return Rendering(rendering.prompt, tuple(shown), rendering.notes)

    def prompt_ids(self, prompts: Sequence[tuple[Any, ...]]) -> list[list[int]]:
        """Tokenize prompts, each given as the arguments of `render_prompt`.

        Raises:
            RefusedRecordError: the chat template refuses one.
        """
        return self._text_ids.prompts([self.render_prompt(*prompt) for prompt in prompts])

    def render_prompt(
        self,
        messages: Iterable[Message],
        record_id: str = "",
        tools: Sequence[dict[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the prompt's text, up to and including the generation prompt.

        Raises:
            RefusedRecordError: the chat template refuses it.
        """
        return self._renderer.prompt(list(messages), record_id, tools=tools, options=options)

    @cached_property
    def token_bytes(self) -> TokenBytes:
        """The bytes of every token; the end of the turn has none, if it is one added token.

        Raises:
            UserError: the tokens are no bytes of the text.
        """
        return TokenBytes(self.tokenizer, self.end_of_turn_ids)

    def fingerprint(self) -> dict[str, str]:
        """Return sha256 identities: vocabulary with merges and normalisers, and chat template."""
        return dict(self._fingerprint)

    @cached_property
    def _fingerprint(self) -> dict[str, str]:
        return {
            "tokenizer_sha256": tokenizer_fingerprint(self.tokenizer),
            "chat_template_sha256": hashlib.sha256(self.template.text.encode()).hexdigest(),
        }
