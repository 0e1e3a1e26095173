"""Ids of prompts and replies: a reply is tokenized as it stands behind its prompt.

Where a joint tokenization would merge the two over the border (a newline at the end of the one and
another at the start of the other), they stay apart: the prompt's ids do not depend on the reply.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from megatron_infifpo.tokens.rendering import Reply
from megatron_infifpo.tokens.special_text import HIDE, SpecialText

# Text before a reply tells the tokenizer where it stands: from the last special token on, or where
# that is far away from a blank before the last so many characters.
_NEAR = 48
_KNOWN = 10_000


class TextIds:
    """Tokenizes what a chat template wrote."""

    def __init__(self, tokenizer: Any, special: SpecialText) -> None:
        """Keep the tokenizer."""
        self._tokenizer, self._special = tokenizer, special
        self._known: dict[str, list[int]] = {}

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids of prompts; a BOS that the tokenizer adds to the template's is taken out."""
        return [self._without_second_bos(ids) for ids in self.ids(texts)]

    def replies(self, pairs: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Ids of replies, given as (prompt, reply with its special texts hidden)."""
        anchors = [self._anchor(prompt) for prompt, _ in pairs]
        texts = [anchor + text for anchor, (_, text) in zip(anchors, pairs, strict=True)]
        result = []
        for ids, anchor, (_, text) in zip(self.ids(texts), anchors, pairs, strict=True):
            before = self._anchor_ids(anchor)
            if HIDE in text:
                result.append(self._ids_with_hidden(text))
            elif ids[: len(before)] == before:
                result.append(ids[len(before) :])
            else:
                result.append(self._apart(text))
        return result

    def scored(self, prompt: str, reply: Reply, count: int) -> np.ndarray:
        """Which tokens of a reply are scored, bool `[count]`: those that begin in a scored part."""
        mark = np.zeros(count, dtype=bool)
        for start, end in reply.scored:
            first, last = (
                self._tokens_before(place, prompt, reply, count) for place in (start, end)
            )
            mark[first:last] = True
        return mark

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of text that a template wrote: its special tokens count, no BOS is added."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            options = {"add_special_tokens": False, "verbose": False}
            return self._tokenizer(texts, **options)["input_ids"] if texts else []
        # Without offsets and masks, a quarter faster; settings of earlier calls stay in it.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = False
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _tokens_before(self, place: int, prompt: str, reply: Reply, count: int) -> int:
        """The number of a reply's tokens before a place in its text; one across it is behind it."""
        if place in (0, len(reply.text)):
            return count if place else 0
        whole, head = self.replies([(prompt, reply.text), (prompt, reply.text[:place])])
        same = 0
        while same < min(len(whole), len(head)) and whole[same] == head[same]:
            same += 1
        return same

    def _anchor(self, prompt: str) -> str:
        """The end of a prompt: what the tokenizer must see before a reply."""
        near = prompt[-2 * _NEAR :]
        start = self._special.last(near)
        if start is not None:
            return near[start:]
        return near[max(near.rfind(" ", 0, _NEAR), near.rfind("\n", 0, _NEAR), 0) :]

    def _anchor_ids(self, anchor: str) -> list[int]:
        if anchor not in self._known:
            if len(self._known) == _KNOWN:  # a template without special tokens: one a prompt
                self._known.clear()
            self._known[anchor] = self.ids([anchor])[0]
        return self._known[anchor]

    def _ids_with_hidden(self, text: str) -> list[int]:
        """Ids of a reply that spells out special tokens."""
        ids: list[int] = []
        for piece, special in self._special.pieces(text):
            ids += self.ids([piece])[0] if special else self._apart(piece, split=True)
        return ids

    def _apart(self, text: str, *, split: bool = False) -> list[int]:
        """Ids of a reply on its own; `split` takes special tokens in it for text."""
        anchor = "\n" if self._adds_blank else ""
        options = {"add_special_tokens": False, "split_special_tokens": split, "verbose": False}
        ids = self._tokenizer(anchor + text, **options)["input_ids"]
        # Without the anchor, SentencePiece would put a blank before a reply that has none.
        skip = self._tokenizer(anchor, **options)["input_ids"] if anchor else []
        return ids[len(skip) :] if ids[: len(skip)] == skip else ids

    @cached_property
    def _adds_blank(self) -> bool:
        """Whether the tokenizer puts a blank before the text (SentencePiece's dummy prefix)."""
        first = self.ids(["a"])[0][0]
        return self._tokenizer.convert_ids_to_tokens(first).startswith("\u2581")

    def _without_second_bos(self, ids: list[int]) -> list[int]:
        bos = self._tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids
