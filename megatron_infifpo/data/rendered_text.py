"""Text that a template has rendered already: each model's own template would render it again."""

import re

_ROLES = r"(?:system|developer|user|human|assistant|model|tool|ipython)"
# What opens a turn in the templates of common families.
_TURN = (
    rf"(?:<\|im_start\|>{_ROLES}|<\|start_header_id\|>{_ROLES}<\|end_header_id\|>"
    rf"|<start_of_turn>{_ROLES}|<\|turn>{_ROLES}|<\|start\|>{_ROLES}|<\|{_ROLES}\|>"
    r"|<\|START_OF_TURN_TOKEN\|>|<｜(?:User|Assistant)｜>|\[INST\])"
)
_BEGIN = r"(?:<s>|<bos>|<\|begin_of_text\|>|<｜begin▁of▁sentence｜>|<\|startoftext\|>)"
_END = (
    r"(?:<\|im_end\|>|<\|eot_id\|>|<\|end_of_text\|>|<end_of_turn>|<turn\|>|<\|end\|>|<\|return\|>"
    r"|<\|endoftext\|>|<\|END_OF_TURN_TOKEN\|>|<｜end▁of▁sentence｜>|<eos>)"
)
_OPENS = re.compile(rf"\s*{_BEGIN}?\s*{_TURN}")
_CLOSES = re.compile(rf"{_END}\s*\Z")
_ASKS = re.compile(rf"{_TURN}(?:<\|im_sep\|>)?\s*(?:<think>\s*)?\Z")


def rendered_mark(text: str, *, reply: bool = False) -> str | None:
    """Return what shows that a text is rendered already, or None.

    Only what stands at the start or the end counts: a text may well speak of chat templates.

    Args:
        text: of a message.
        reply: it is an assistant's.
    """
    found = _OPENS.match(text) or _CLOSES.search(text) or (None if reply else _ASKS.search(text))
    if found is None and reply and text.rstrip().endswith("</s>") and "<s>" not in text:
        return "</s>"  # and not the end of what HTML strikes out
    return found[0].strip() if found else None
