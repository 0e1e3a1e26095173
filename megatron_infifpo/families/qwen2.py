"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, dense_args, window_args, windowed_layers
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.ropes import rope_args
from megatron_infifpo.families.transforms import QKV


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `qwen2` config.json."""
    config = {"sliding_window": 4096, **config}  # transformers' default
    window = window_args(config, windowed_layers(config))
    return dense_args(config) | rope_args(config) | window | {"add_qkv_bias": True}


ROWS = (
    *llama.ROWS,
    Row(
        "decoder.layers.self_attention.linear_qkv.bias",
        (
            "model.layers.{}.self_attn.q_proj.bias",
            "model.layers.{}.self_attn.k_proj.bias",
            "model.layers.{}.self_attn.v_proj.bias",
        ),
        ("qkv",),
        QKV,
        needs="add_qkv_bias",
    ),
)

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2.5-14b": {
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 13824, "max_position_embeddings": 32768, "max_window_layers": 70,
        "num_attention_heads": 40, "num_hidden_layers": 48, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    },
    "qwen2.5-math-7b": {
        "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 4096, "max_window_layers": 28,
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 152064,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 2,
    },
    "qwen2-yarn": {
        "model_type": "qwen2",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    },
}  # fmt: skip
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED)
