"""Llama 2 and 3.x, and models that declare themselves `llama` (SmolLM2, ...)."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families.common import Family, dense_args
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.mapping import OUTPUT_LAYER, Row
from megatron_infifpo.families.ropes import rope_args
from megatron_infifpo.families.transforms import GATE_UP, QKV


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `llama` config.json."""
    for field in ("attention_bias", "mlp_bias"):
        refuse(config, field, unless=[False, None], reason="biased projections are not supported")
    return dense_args(config) | rope_args(config)


ROWS = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ("vocab", "hidden")),
    Row(
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{}.input_layernorm.weight",),
        ("hidden",),
    ),
    Row(
        "decoder.layers.self_attention.linear_qkv.weight",
        (
            "model.layers.{}.self_attn.q_proj.weight",
            "model.layers.{}.self_attn.k_proj.weight",
            "model.layers.{}.self_attn.v_proj.weight",
        ),
        ("qkv", "hidden"),
        QKV,
    ),
    Row(
        "decoder.layers.self_attention.linear_proj.weight",
        ("model.layers.{}.self_attn.o_proj.weight",),
        ("hidden", "attention"),
    ),
    Row(
        "decoder.layers.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{}.post_attention_layernorm.weight",),
        ("hidden",),
    ),
    Row(
        "decoder.layers.mlp.linear_fc1.weight",
        ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        ("gate_up", "hidden"),
        GATE_UP,
    ),
    Row(
        "decoder.layers.mlp.linear_fc2.weight",
        ("model.layers.{}.mlp.down_proj.weight",),
        ("hidden", "ffn"),
    ),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
    Row(
        OUTPUT_LAYER,
        ("lm_head.weight",),
        ("vocab", "hidden"),
        needs="untie_embeddings_and_output_weights",
    ),
)

FAMILY = Family(
    megatron_args,
    ROWS,
    tiny={
        "llama": {"model_type": "llama", "tie_word_embeddings": False},
        "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    },
)
