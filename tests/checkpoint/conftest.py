"""Hugging Face folders for conversion tests: random tiny models, and a real one."""

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory) -> Path:
    """A tiny Qwen2: tensors of every kind."""
    return tiny.save_model(tmp_path_factory.mktemp("qwen2") / "hf", "qwen2")
