"""Qwen3: Llama with RMSNorms on every query and key head, and heads of any size."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, dense_args, window_args, windowed_layers
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.ropes import rope_args


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `qwen3` config.json."""
    refuse(
        config,
        "attention_bias",
        unless=[False, None],
        reason="biased projections are not supported",
    )
    # transformers' defaults; head_dim is not hidden_size / num_attention_heads.
    config = {"head_dim": 128, "sliding_window": 4096, **config}
    window = window_args(config, windowed_layers(config))
    return dense_args(config) | rope_args(config) | window | {"qk_layernorm": True}


ROWS = (
    *llama.ROWS,
    Row(
        "decoder.layers.self_attention.q_layernorm.weight",
        ("model.layers.{}.self_attn.q_norm.weight",),
        ("head_dim",),
    ),
    Row(
        "decoder.layers.self_attention.k_layernorm.weight",
        ("model.layers.{}.self_attn.k_norm.weight",),
        ("head_dim",),
    ),
)

FAMILY = Family(
    megatron_args,
    ROWS,
    tiny={
        "qwen3": {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 24},
        "qwen3-tied": {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 8},
    },
)
