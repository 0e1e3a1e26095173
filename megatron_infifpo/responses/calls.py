"""Does a sampled text call a tool? Then it is no answer, and must not become one."""

import re
from collections.abc import Sequence
from typing import Any

# What models write around calls, each in the words of its chat template.
_MARKS = re.compile(
    r"<\|?tool_calls?(?:_start)?\|?>"  # Qwen, GLM, Nemotron, Gemma 4, LFM2
    r"|\[TOOL_CALLS\]|<\|python_tag\|>|<function="  # Mistral, Llama, Qwen's coders
    r"|<｜tool▁calls?▁begin｜>|<\w+:function_calls>"  # DeepSeek, Muse
    r"|\bto=functions\."  # gpt-oss
)


def writes_call(text: str, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether a text is, or holds, a call of a tool, in any model's notation.

    Args:
        text: of a reply, with its special tokens or without.
        tools: those that its prompt has, as JSON schemas; without any a text is a text.
    """
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
    known = "|".join(re.escape(name) for name in names if name)
    if not known:
        return False
    # Where the marks were special tokens, and are gone: JSON, or the tool's name at the start.
    bare = rf'"name"\s*:\s*"(?:{known})"|\A\W*(?:call:|function)?(?:{known})(?:\s*[({{]|\n```json)'
    return bool(_MARKS.search(text) or re.search(bare, text))
