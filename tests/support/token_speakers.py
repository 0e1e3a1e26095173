"""What the oracle of token-level fusion knows of texts: models, tokens, alignment, vocabularies.

Nothing here is the program's. Models are transformers' in float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

Span = tuple[int, int]


class Speaker:
    """A model in float64, and the tokens that it makes of conversations.

    Attributes:
        pieces: bytes of each id; b"" of special ones.
        end: the id that ends a turn.
    """

    def __init__(self, folder: Path, *, trims: bool = False) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        self.trims = trims
        self.specials = dict(self.tokenizer.get_added_vocab())
        byte_of = _byte_of_character()
        self.pieces = [b""] * len(self.tokenizer)
        for text, number in self.tokenizer.get_vocab().items():
            if text not in self.specials:
                self.pieces[number] = bytes(byte_of[c] for c in text)
        self.end = self.specials["<|end|>"]

    def cut(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def read(self, messages: Sequence[dict[str, str]], score: str) -> tuple[list[int], list[int]]:
        """Return a conversation's ids, and the places of those that are scored."""
        last = max(i for i, m in enumerate(messages) if m["role"] == "user")
        ids: list[int] = []
        scored: list[int] = []
        for i, message in enumerate(messages):
            text = message["content"].strip() if self.trims else message["content"]
            ids.append(self.specials[f"<|{message['role']}|>"])
            said = [*self.cut(text), self.end]
            if message["role"] == "assistant" and (score == "all" or i > last):
                scored += range(len(ids), len(ids) + len(said))
            ids += said
        return ids, scored

    def say(self, messages: Sequence[dict[str, str]], score: str) -> "Said":
        ids, scored = self.read(messages, score)
        logps = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], dim=-1)
        rows = torch.tensor(scored)
        observed = [ids[t] for t in scored]
        return Said(observed, [self.pieces[i] for i in observed], logps[rows - 1])


@dataclass
class Said:
    """Scored tokens of a response, their bytes, and the distribution before each, `[K, V]`."""

    ids: list[int]
    pieces: list[bytes]
    logps: torch.Tensor

    @property
    def values(self) -> list[float]:
        return [float(self.logps[t, i]) for t, i in enumerate(self.ids)]

    def top(self, k: int) -> list[list[tuple[int, float]]]:
        """Of each token the k most probable ids and their log-probs, as float16 keeps them."""
        found = torch.topk(self.logps.detach(), k)
        both = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [[(i, half(x)) for i, x in zip(*row, strict=True)] for row in both]


def half(value: float) -> float:
    return float(np.float16(value))


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet, from the tokenizers' own: printable ones are themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    found = {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}
    assert set(found) == set(ByteLevel.alphabet())
    return found


@dataclass
class Match:
    """Tokens that two models have in common, and texts that they cut differently."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[Span, Span]] = field(default_factory=list)


def match(a: Sequence[bytes], b: Sequence[bytes], *, starts: bool) -> Match | None:
    """Align two models' tokens, byte by byte; None where their texts differ."""
    texts = b"".join(a), b"".join(b)
    skip = [0, 0]
    length = len(texts[0])
    if texts[0] != texts[1]:
        inner = [text.strip(b" \t\n\r\x0b\x0c") for text in texts]
        if inner[0] != inner[1]:
            return None
        skip = [text.index(inner[0]) for text in texts]
        length = len(inner[0])
    found = Match()
    places: list[tuple[list[tuple[int, int, bool]], dict[int, list[int]]]] = []
    for pieces, before in zip((a, b), skip, strict=True):
        tokens: list[tuple[int, int, bool]] = []
        specials: dict[int, list[int]] = {}
        at = -before
        for number, piece in enumerate(pieces):
            first, at = at, at + len(piece)
            left = min(at, length) - max(first, 0)
            if piece and left > 0:
                tokens.append((number, min(at, length), left < len(piece)))
            elif not piece and at <= length:
                specials.setdefault(max(at, 0), []).append(number)
        places.append((tokens, specials))
    (here, special_here), (there, special_there) = places
    at = 0
    for border in sorted({t[1] for t in here} & {t[1] for t in there}):
        sides = [[t for t in side if at < t[1] <= border] for side in (here, there)]
        at = border
        if any(touched for side in sides for _, _, touched in side):
            continue
        single = all(len(side) == 1 for side in sides)
        if single or starts:
            found.rows.append((sides[0][0][0], sides[1][0][0]))
        spans = [(side[0][0], side[-1][0] + 1) for side in sides]
        unbroken = all(e - f == len(s) for (f, e), s in zip(spans, sides, strict=True))
        if not single and unbroken:
            found.chunks.append((spans[0], spans[1]))
    for place, numbers in special_here.items():
        if len(numbers) == 1 == len(special_there.get(place, [])):
            found.rows.append((numbers[0], special_there[place][0]))
    found.rows.sort()
    return found


def vocabulary_map(source: Speaker, pivot: Speaker, ambiguous: str) -> dict[int, tuple[int, ...]]:
    """For each id of a source the ids of the pivot that it stands for; those without are absent."""
    by_bytes = {piece: i for i, piece in enumerate(pivot.pieces) if piece}
    own = {piece: i for i, piece in enumerate(source.pieces) if piece}
    twins = {s: by_bytes[p] for s, p in enumerate(source.pieces) if p and p in by_bytes}
    # Classes, as sets that are joined: ("s", id) and ("w", id).
    group: dict[tuple[str, int], set[tuple[str, int]]] = {}

    def join(a: tuple[str, int], b: tuple[str, int]) -> None:
        both = group.setdefault(a, {a}) | group.setdefault(b, {b})
        for one in both:
            group[one] = both

    def first(piece: bytes, speaker: Speaker, known: dict[bytes, int]) -> int | None:
        if piece in known:
            return known[piece]
        try:
            return speaker.cut(piece.decode())[0]
        except UnicodeDecodeError:
            return None

    for w, piece in enumerate(pivot.pieces):
        if piece and (phi := first(piece, source, own)) is not None:
            join(("s", phi), ("w", w))
    # What is no text alone is of no class: other texts than those of this source's id begin so.
    for s, piece in enumerate(source.pieces):
        if piece and s not in twins and (psi := first(piece, pivot, by_bytes)) is not None:
            if ("w", psi) in group:
                join(("s", s), ("w", psi))
    found: dict[int, tuple[int, ...]] = {source.end: (pivot.end,)}
    for s, piece in enumerate(source.pieces):
        if not piece:
            continue
        number = piece.lstrip(b" ").isdigit()
        if ambiguous == "id" or (ambiguous == "digits" and not number):
            members: tuple[int, ...] = (twins[s],) if s in twins else ()
        else:
            members = tuple(sorted(w for kind, w in group.get(("s", s), ()) if kind == "w"))
            if len(members) > 1 and ambiguous != "group":
                members = ()
        if members:
            found[s] = members
    return found
