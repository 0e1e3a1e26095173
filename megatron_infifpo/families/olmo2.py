"""OLMo 2: norms after attention and MLP only, and norms over all query and all key heads."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, FamilyLayers, dense_args
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.ropes import rope_args


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of an `olmo2` config.json."""
    return common_args(config) | rope_args(config)


def common_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of OLMo 2 and 3, without a rope."""
    refuse(
        config,
        "attention_bias",
        unless=[False, None],
        reason="biased projections are not supported",
    )
    # What Megatron's arguments cannot say: it does not run OLMo without these layers.
    return dense_args(config) | {"extras": {"norms": "after sublayers, of whole projections"}}


def _norm(key: str, name: str, size: str) -> Row:
    return Row(f"decoder.layers.{key}", (f"model.layers.{{}}.{name}.weight",), (size,))


ROWS = (
    *(row for row in llama.ROWS if not row.key.endswith("layer_norm_weight")),
    _norm("self_attention.q_layernorm.weight", "self_attn.q_norm", "attention"),
    _norm("self_attention.k_layernorm.weight", "self_attn.k_norm", "keys"),
    _norm("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm", "hidden"),
    _norm("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm", "hidden"),
)


def layers() -> FamilyLayers:
    """Layers of OLMo 2 and 3."""
    from megatron_infifpo.families import parts

    def adapt(layer: Any, made_of: Any) -> Any:
        layer.submodules.self_attention.module = parts.WholeNormAttention
        return parts.with_post_norms(parts.without_pre_norms(layer, made_of), made_of)

    return FamilyLayers(adapt, parts.configure, parts.complete)


PUBLISHED: dict[str, dict[str, Any]] = {
    "olmo-2-7b": {
        "model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
        "rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "olmo2": {"model_type": "olmo2", "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED, layers=layers)
