"""GLM-4 (0414): GLM with norms after each sublayer, too."""

from typing import Any

from megatron_infifpo.families import glm
from megatron_infifpo.families.common import Family, FamilyLayers
from megatron_infifpo.families.mapping import Row


def _norm(key: str, name: str) -> Row:
    return Row(f"decoder.layers.{key}", (f"model.layers.{{}}.{name}.weight",), ("hidden",))


ROWS = (
    *glm.ROWS,
    _norm("self_attention.linear_proj.post_layernorm.weight", "post_self_attn_layernorm"),
    _norm("mlp.linear_fc2.post_layernorm.weight", "post_mlp_layernorm"),
)


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
FAMILY = Family(glm.megatron_args, ROWS, TINY, PUBLISHED, layers=_layers)
