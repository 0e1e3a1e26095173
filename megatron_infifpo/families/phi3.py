"""Phi-3 and Phi-4: fused projections, and a rotary embedding on a part of each head or all of it.

Phi-4 has 10 key-value heads, so TP may be 1, 2, 5 or 10.
"""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, dense_args, rope_args, window_args
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.transforms import FUSED_QKV


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `phi3` config.json."""
    return dense_args(config) | rope_args(config, partial=True) | window_args(config)


_FUSED = (
    Row(
        "decoder.layers.self_attention.linear_qkv.weight",
        ("model.layers.{}.self_attn.qkv_proj.weight",),
        ("qkv", "hidden"),
        FUSED_QKV,
    ),
    # Both hold the gate, then the up projection.
    Row(
        "decoder.layers.mlp.linear_fc1.weight",
        ("model.layers.{}.mlp.gate_up_proj.weight",),
        ("gate_up", "hidden"),
    ),
)
ROWS = tuple({row.key: row for row in (*llama.ROWS, *_FUSED)}.values())

PUBLISHED: dict[str, dict[str, Any]] = {
    "phi-4": {
        "model_type": "phi3", "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
        "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 100352, "pad_token_id": 100349,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "phi3-partial": {
        "model_type": "phi3",
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
    },
    "phi3-window": {"model_type": "phi3", "tie_word_embeddings": False, "sliding_window": 16},
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED)
