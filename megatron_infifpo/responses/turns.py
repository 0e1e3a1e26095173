"""What a model's tokenizer and chat template do around a response that is sampled here."""

import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_infifpo.errors import UserError
from megatron_infifpo.responses.answers import UNREAD_CALL, Response, split_reasoning
from megatron_infifpo.responses.calls import writes_call
from megatron_infifpo.responses.prompts import Prompt
from megatron_infifpo.tokens.tokenization import ChatTokenizer


class Opened(NamedTuple):
    """A prompt up to and with the generation prompt, and the tools that it may call."""

    text: str
    ids: list[int]
    tools: Sequence[dict[str, Any]] = ()


class Turns:
    """Opens turns, and sees where they end.

    Attributes:
        chat: the tokenizer with its template.
        ids: token ids, each of which ends a response.
        texts: texts, each of which ends a response: the end of the turn, where it is no token.
        context: tokens of a prompt with its response.
    """

    def __init__(
        self,
        chat: ChatTokenizer,
        generation_config: Any = None,
        *,
        context: int | None = None,
        skip: bool = False,
    ) -> None:
        """Find what ends a turn: what the template writes, and what the model's files name.

        Args:
            chat: the tokenizer with its template.
            generation_config: of the model, if there is one.
            context: tokens that the model takes; None: any number.
            skip: leave out a prompt that cannot be asked; else it is an error.
        """
        self.chat, self.context, self._skip = chat, context or sys.maxsize, skip
        turn, added = chat.end_of_turn_ids, chat.tokenizer.added_tokens_decoder
        self._lead = chat.template.habits({}).lead
        named = getattr(generation_config, "eos_token_id", None)
        # Files of converted models name ordinary tokens at times: those end no turn.
        ids = [i for i in (named if isinstance(named, list) else [named]) if i in added]
        self.ids: set[int] = {i for i in (*ids, chat.tokenizer.eos_token_id) if i is not None}
        self.texts, self._before_end = [], ""
        if turn and turn[-1] in added:
            self.ids.add(turn[-1])
            # What the template writes before that token is no part of the answer.
            self._before_end = chat.end_of_turn.removesuffix(added[turn[-1]].content)
        elif chat.end_of_turn.strip():
            self.texts = [chat.end_of_turn.strip()]
        specials = sorted((t.content for t in added.values() if t.special), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, specials)) or r"(?!)")

    def open(self, prompt: Prompt) -> Opened:
        """Render a prompt.

        Raises:
            UserError: the chat template refuses it, or it leaves no room for a response.
        """
        asked = (prompt.messages, prompt.id, prompt.tools, prompt.template_options)
        text, ids = self.chat.render_prompt(*asked), self.chat.prompt_ids([asked])[0]
        opened = Opened(text, ids, prompt.tools)
        if len(opened.ids) >= self.context:
            raise UserError(
                f"prompt {prompt.id!r} has {len(opened.ids)} tokens, expected fewer than the "
                f"model's context of {self.context}; --on-bad-record skip leaves it out"
            )
        return opened

    def open_all(self, prompts: Sequence[Prompt]) -> list[Opened | None]:
        """Render prompts; None for one that is left out, with its reason on stderr.

        Raises:
            UserError: one cannot be asked, and is not to be skipped.
        """
        found: list[Opened | None] = []
        for prompt in prompts:
            try:
                found.append(self.open(prompt))
            except UserError as error:
                if not self._skip:
                    raise
                print(f"skipped: {error}", file=sys.stderr)
                found.append(None)
        return found

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Drop what follows the end of the turn."""
        stop = next((i for i, token in enumerate(ids) if token in self.ids), len(ids))
        return list(ids[: stop + 1])

    def response(self, ids: Sequence[int], opened: Opened, finish: str | None = None) -> Response:
        """Make sampled ids a response.

        Args:
            ids: the response's, with whatever an engine puts after its end.
            opened: the prompt.
            finish: why it ended, as the engine says; default: by the ids.
        """
        ids = self.cut(ids)
        ended = bool(ids) and ids[-1] in self.ids
        # Markers of reasoning may be special tokens: those go only once they have been read.
        text = str(
            self.chat.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        )
        for end in self.texts:
            before, found, _ = text.partition(end)
            text, ended = before, ended or bool(found)
        text = text.removesuffix(self._before_end) if ended else text
        text = text.removeprefix(self._lead)  # before the answer, as before every plain one
        answer, reasoning = split_reasoning(text, self.chat.template.text, opened.text)
        if writes_call(answer if answer.strip() else text, opened.tools):
            finish = UNREAD_CALL
        return Response(
            self._specials.sub("", answer),
            finish or ("stop" if ended else "length"),
            self._specials.sub("", reasoning) if reasoning else None,
        )
