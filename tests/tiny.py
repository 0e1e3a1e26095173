"""Tiny models, tokenizers and preference records, made on the spot; and what they are held to."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_infifpo.checks.tiny import (  # noqa: F401  (for the tests)
    FAMILIES,
    SHAPE,
    TEMPLATE,
    WORDS,
    save_model,
    save_tokenizer,
    write_records,
)


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
