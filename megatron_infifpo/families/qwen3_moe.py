"""Qwen3 with experts: Qwen3 whose layers, all or some, have many small MLPs."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import qwen3
from megatron_infifpo.families.common import Family, dense_args, refuse, window_args
from megatron_infifpo.families.experts import (
    expert_args,
    one_sparse_layer,
    sparse_layers,
    with_experts,
)
from megatron_infifpo.families.ropes import rope_args

# transformers' defaults, which a file may leave out. Heads are not hidden_size / their number.
_DEFAULTS = {
    "head_dim": 128,
    "sliding_window": 4096,
    "num_experts": 128,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `qwen3_moe` config.json."""
    refuse(
        config,
        "attention_bias",
        unless=[False, None],
        reason="biased projections are not supported",
    )
    config = {**_DEFAULTS, **config}
    # Its window, where it is used, is that of every layer.
    window = window_args(config if config.get("use_sliding_window") else no_window(config))
    experts = expert_args(
        experts=count_of_experts(config),
        width=config["moe_intermediate_size"],
        chosen=config["num_experts_per_tok"],
        normalised=bool(config.get("norm_topk_prob", False)),
        sparse=sparse_layers(config),
    )
    return dense_args(config) | rope_args(config) | window | {"qk_layernorm": True} | experts


def no_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without a sliding window."""
    return {**config, "sliding_window": None}


def count_of_experts(config: Mapping[str, Any]) -> int:
    """Experts of a layer, under the name of published files or of those that transformers saves."""
    count: int = config.get("num_local_experts") or config["num_experts"]
    return count


EXPERTS = "model.layers.{}.mlp.experts.{}."
ROWS = with_experts(
    qwen3.ROWS,
    "model.layers.{}.mlp.gate.weight",
    (
        f"{EXPERTS}gate_proj.weight",
        f"{EXPERTS}up_proj.weight",
        f"{EXPERTS}down_proj.weight",
    ),
)

PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
        "vocab_size": 151936,
    },
}  # fmt: skip
_SMALL = {"model_type": "qwen3_moe", "head_dim": 24, "moe_intermediate_size": 40, "num_experts": 8}
TINY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_SMALL, "num_experts_per_tok": 3, "norm_topk_prob": True},
    "qwen3_moe-mixed": {
        **_SMALL,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED, one_layer=one_sparse_layer)
