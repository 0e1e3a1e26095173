"""The bytes of tokens: what each id of a vocabulary stands for in a text.

Models with different vocabularies agree on nothing but a text's bytes. These come from the
vocabulary alone, so that a token has the same bytes wherever it stands; only the blank that
SentencePiece writes before a text is not in the text (`without_blank`).
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError

_BLANK = "\u2581"  # SentencePiece's
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # its byte fallback
_PROBE = "the sum of 12, or a b?"


class TokenBytes:
    """The bytes of every token of a tokenizer.

    Attributes:
        pieces: `[V]` by id, V one more than the highest: what the token adds to a text; b"" of a
            special token, of the end of the turn and of an id that has none.
        lengths: uint16 `[V]`, of the pieces.
    """

    def __init__(self, tokenizer: Any, end_of_turn_ids: Sequence[int] = ()) -> None:
        """Read a Hugging Face tokenizer's vocabulary.

        Args:
            tokenizer: the Hugging Face tokenizer.
            end_of_turn_ids: what ends a reply. If it is one added token it is no text, special or
                not; a reply that spells out one that is not special lacks its bytes. What ends a
                turn otherwise, several tokens or a word, is text: with it responses are other texts
                than those of models that end their turns with a token.

        Raises:
            UserError: its tokens do not make up the text that they were made of.
        """
        vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
        self.pieces = [b""] * (1 + max([*vocabulary.values(), *added]))
        read = _reader(tokenizer)
        if read is not None:
            for token, number in vocabulary.items():
                self.pieces[number] = read(token)
        for number, token in added.items():
            ends = list(end_of_turn_ids) == [number]
            self.pieces[number] = b"" if token.special or ends else token.content.encode()
        self.lengths = np.array([len(piece) for piece in self.pieces], np.uint16)
        found = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        if read is None or without_blank(self.join(found), _PROBE.encode()) != _PROBE.encode():
            raise UserError(
                f"the tokens of {tokenizer.name_or_path or 'this tokenizer'} are no bytes of the "
                "text, expected a byte-level BPE or a SentencePiece tokenizer: models whose "
                "tokenizer drops blanks or rewrites words cannot take part in token-level fusion"
            )

    def join(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of tokens, joined."""
        pieces = self.pieces
        return b"".join([pieces[number] for number in ids])


def without_blank(joined: bytes, text: bytes) -> bytes:
    """Return the bytes of tokens without a blank that the tokenizer has put before the text.

    Args:
        joined: the bytes of the tokens.
        text: what they were made of, or the beginning of it, and what may follow.
    """
    if joined[:1] == b" " and not text.startswith(joined) and text.startswith(joined[1:]):
        return joined[1:]
    return joined


def _reader(tokenizer: Any) -> Callable[[str], bytes] | None:
    """Return how to read a vocabulary's strings as bytes, None where they are no bytes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _sentencepiece if hasattr(tokenizer, "sp_model") else None
    decoder = json.loads(backend.to_str())["decoder"] or {}
    steps = [decoder, *decoder.get("decoders", ())]
    if any(step.get("type") == "ByteLevel" for step in steps):
        return _byte_level
    blanks = ({"type": "Metaspace", "replacement": _BLANK}, {"pattern": {"String": _BLANK}})
    if any(blank.items() <= step.items() for blank in blanks for step in steps):
        return _sentencepiece
    return None


@cache
def _alphabet() -> dict[str, int]:
    """Bytes by the characters that byte-level BPE (GPT-2's) writes them as.

    Printable characters of Latin-1 stand for themselves, the other bytes for those from 256 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def _byte_level(token: str) -> bytes:
    try:
        return bytes(map(_alphabet().__getitem__, token))
    except KeyError:  # not of the alphabet: such a token is decoded as it is
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    byte = _BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_BLANK, " ").encode()
