"""Special tokens as text: a reply may spell one out, and no tokenizer must take it for the token.

Before a reply is rendered, what looks like a special token in it is hidden behind private
characters; special tokens that are in the text then are the template's own.
"""

import re
from collections.abc import Callable
from typing import Any

from megatron_infifpo.records.records import Message

HIDE, SHOW = "\ue0f0", "\ue0f1"
# Marks of reasoning are special tokens in some vocabularies; a reply may well hold them.
_REASONING = re.compile(r"think|thought|reason", re.IGNORECASE)
_KEPT = ("role", "type", "id")


class SpecialText:
    """The special tokens of a tokenizer as text.

    Attributes:
        names: their texts, but for those that mark reasoning.
    """

    def __init__(self, tokenizer: Any) -> None:
        """List the special tokens."""
        found = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self.names = sorted(s for s in found if s.strip() and not _REASONING.search(s))
        self._any = _any_of(self.names)
        # In a text whose special tokens are hidden, marks of reasoning are what they look like.
        self._every = _any_of([s for s in found if s.strip()])
        self._hidden = re.compile(f"{HIDE}(\\d+){SHOW}")

    def hide(self, message: Message) -> Message:
        """Return a message in which nothing looks like a special token."""
        return _map_text(message, lambda text: self._any.sub(self._hide, text))

    def _hide(self, found: re.Match[str]) -> str:
        return f"{HIDE}{self.names.index(found[0])}{SHOW}"

    def show(self, text: str) -> str:
        """Return a text with what `hide` has hidden in it."""
        return self._hidden.sub(lambda found: self.names[int(found[1])], text)

    def starts(self, text: str, place: int) -> int:
        """Return where the special token ends that a text has at a place, 0 if it has none."""
        found = self._any.match(text, place)
        return found.end() if found else 0

    def last(self, text: str) -> int | None:
        """Return where the last special token in a text begins, None if there is none."""
        return max((found.start() for found in self._any.finditer(text)), default=None)

    def pieces(self, text: str) -> list[tuple[str, bool]]:
        """Split a text with hidden tokens at the template's own: `(piece, is a special token)`."""
        found, start = [], 0
        for match in self._every.finditer(text):
            found += [(self.show(text[start : match.start()]), False), (match[0], True)]
            start = match.end()
        return [piece for piece in [*found, (self.show(text[start:]), False)] if piece[0]]


def _any_of(names: list[str]) -> re.Pattern[str]:
    """Match any of some texts, the longest that fits."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """Change every text in a message but those of its form."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_map_text(item, change) for item in value]
    if isinstance(value, dict):
        return {k: v if k in _KEPT else _map_text(v, change) for k, v in value.items()}
    return value
