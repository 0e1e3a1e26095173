"""Real tokenizers, loaded once: they take seconds."""

import pytest

from megatron_infifpo.tokens.tokenization import ChatTokenizer


@pytest.fixture(scope="session")
def real(shared_data):
    names = ("phi-4", "qwen2.5", "mistral-small")
    return {
        name: ChatTokenizer.from_pretrained(shared_data / "tokenizers" / name) for name in names
    }
