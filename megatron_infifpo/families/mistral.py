"""Mistral: Llama with a sliding window (first versions) and heads of any size (Small, Nemo)."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, dense_args, window_args
from megatron_infifpo.families.ropes import rope_args


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `mistral` config.json."""
    # A file that leaves these out means transformers' defaults; null means none.
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}
    return dense_args(config) | rope_args(config) | window_args(config)


PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral-small-24b": {
        "model_type": "mistral", "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 32768, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 100000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 131072,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "mistral": {
        "model_type": "mistral",
        "tie_word_embeddings": False,
        "head_dim": 24,
        "sliding_window": None,
    },
    "mistral-window": {"model_type": "mistral", "tie_word_embeddings": False, "sliding_window": 16},
}
FAMILY = Family(megatron_args, llama.ROWS, TINY, PUBLISHED)
