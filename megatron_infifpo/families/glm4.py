"""GLM-4 (0414): norms before and after each sublayer, and neighbouring channels rotated in part."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import phi3, qwen2
from megatron_infifpo.families.common import Family, FamilyLayers, dense_args
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.ropes import rope_args
from megatron_infifpo.families.transforms import QKV

# Defaults of transformers.
_DEFAULTS = {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `glm4` config.json."""
    config = {**_DEFAULTS, "partial_rotary_factor": 0.5, **config}
    return (
        dense_args(config)
        | rope_args(config, partial=True)
        | {"add_qkv_bias": bool(config["attention_bias"]), "extras": {"interleaved": True}}
    )


def _norm(key: str, name: str) -> Row:
    return Row(f"decoder.layers.{key}", (f"model.layers.{{}}.{name}.weight",), ("hidden",))


_BIAS = "decoder.layers.self_attention.linear_qkv.bias"
_OWN = (
    Row(
        "decoder.layers.self_attention.linear_qkv.weight",
        tuple(f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"),
        ("qkv", "hidden"),
        QKV,
    ),
    *(row for row in qwen2.ROWS if row.key == _BIAS),
    _norm("self_attention.linear_proj.post_layernorm.weight", "post_self_attn_layernorm"),
    _norm("mlp.linear_fc2.post_layernorm.weight", "post_mlp_layernorm"),
)
ROWS = tuple({row.key: row for row in (*phi3.ROWS, *_OWN)}.values())


def _layers() -> FamilyLayers:
    from megatron_infifpo.families import parts

    return FamilyLayers(parts.with_post_norms, parts.configure, parts.complete)


PUBLISHED: dict[str, dict[str, Any]] = {
    "glm-4-9b-0414": {
        "model_type": "glm4", "attention_bias": True, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 151552,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "glm4": {"model_type": "glm4", "head_dim": 16, "attention_bias": True},
    "glm4-unbiased": {
        "model_type": "glm4",
        "head_dim": 8,
        "attention_bias": False,
        "partial_rotary_factor": 1.0,
    },
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED, layers=_layers)
