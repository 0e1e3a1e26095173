"""Hugging Face folders for conversion tests: random tiny models, and a real one."""

from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file


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


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory) -> Path:
    """A tiny Qwen2: tensors of every kind."""
    return tiny.save_model(tmp_path_factory.mktemp("qwen2") / "hf", "qwen2")
