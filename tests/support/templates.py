"""TRL's published chat templates, each with one vocabulary that has its special tokens."""

import functools
import re
from pathlib import Path

import trl

from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.datasets import byte_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))


@functools.cache
def chat(name: str) -> ChatTokenizer:
    """A byte tokenizer with a template."""
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    hf = byte_tokenizer(text)
    special = re.findall(r"<[|｜][^<>'\"\s]*?[|｜]?>|<\w+[|]>|<(?:start|end)_of\w+>", text)
    hf.add_special_tokens({"additional_special_tokens": sorted(set(special))})
    hf.add_tokens(["<think>", "</think>"])
    return ChatTokenizer(hf, name)
