"""Tiny models, tokenizers and preference records, made on the spot; and what they are held to."""

import json
import random
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
    write_records,
)

FAMILIES = TINY


def write_lists(path: Path, count: int, seed: int = 0, *, most: int = 4) -> Path:
    """Write lists of 2 to `most` responses with scores, in two domains."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            responses = [f"{text(1, 25)} {k}" for k in range(rng.randint(2, most))]
            record = {
                "id": f"{path.stem}-{i}",
                "domain": "code" if i % 3 == 0 else "general",
                "prompt": text(2, 14),
                "responses": responses,
                "scores": [round(rng.uniform(-2, 2), 2) for _ in responses],
            }
            file.write(json.dumps(record) + "\n")
    return path


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
