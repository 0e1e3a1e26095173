"""Tiny models, tokenizers and preference records, made on the spot; and what they are held to."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_infifpo.families import TINY
from megatron_infifpo.gpu_check.tiny import (  # noqa: F401  (for the tests)
    SHAPE,
    TEMPLATE,
    WORDS,
    config,
    save_model,
    save_tokenizer,
    write_lists,
    write_records,
)

FAMILIES = TINY


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a Hugging Face folder, read without our code."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def assert_same_weights(a: Path, b: Path) -> None:
    """Same names, dtypes, shapes and bits."""
    left, right = load_weights(a), load_weights(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def add_turns(path: Path) -> Path:
    """Let every other record's replies part before the last turn: the end alone is scored."""

    def turns(text: str) -> list[dict[str, str]]:
        first, last = text.rsplit(" ", 1)
        roles = zip(("assistant", "user", "assistant"), (first, "and?", last), strict=True)
        return [{"role": role, "content": content} for role, content in roles]

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows[::2]:
        row |= {
            name: turns(row[name]) for name in ("chosen", "rejected", "pivot_chosen") if name in row
        }
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
