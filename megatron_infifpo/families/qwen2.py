"""Qwen2 and Qwen2.5: Llama with biases on the query, key and value projections."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import (
    Family,
    dense_args,
    rope_args,
    window_args,
    windowed_layers,
)
from megatron_infifpo.families.mapping import Row
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
    ),
)

FAMILY = Family(megatron_args, ROWS)
