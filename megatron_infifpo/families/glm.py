"""GLM-4-9B as transformers has it (-hf): fused gates, and neighbouring channels rotated in part."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import phi3, qwen2
from megatron_infifpo.families.common import Family, FamilyLayers, dense_args
from megatron_infifpo.families.ropes import rope_args

# Defaults of transformers.
_DEFAULTS = {"attention_bias": True, "head_dim": 128, "num_key_value_heads": 2}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `glm` or `glm4` config.json."""
    config = {**_DEFAULTS, "partial_rotary_factor": 0.5, **config}
    return (
        dense_args(config)
        | rope_args(config, partial=True)
        | {"add_qkv_bias": bool(config["attention_bias"]), "extras": {"interleaved": True}}
    )


# Attention as Qwen2's, the gate and the up projection in one tensor as Phi-3's.
_FUSED = "decoder.layers.mlp.linear_fc1.weight"
ROWS = (
    *(row for row in qwen2.ROWS if row.key != _FUSED),
    *(row for row in phi3.ROWS if row.key == _FUSED),
)


def _layers() -> FamilyLayers:
    from megatron_infifpo.families import parts

    return FamilyLayers(configure=parts.configure, complete=parts.complete)


PUBLISHED: dict[str, dict[str, Any]] = {
    "glm-4-9b-chat": {
        "model_type": "glm", "attention_bias": True, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.5, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "vocab_size": 151552,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {"glm": {"model_type": "glm", "head_dim": 16}}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED, layers=_layers)
