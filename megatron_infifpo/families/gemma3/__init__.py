"""Gemma 3, the language model: of text-only checkpoints, and of those that also read images.

Beyond Llama: zero-centred norms, norms after attention and MLP too, q/k norms, a gated tanh-GELU,
scaled embeddings, and two kinds of layers: local ones with a sliding window and a small rope base,
and global ones. What Megatron's GPTModel has no argument for is in `extras`; `layers.py` acts
on it.
"""

import math
from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import (
    Family,
    dense_args,
    inner_text,
    language_name,
    sliding_layers,
    window_args,
)
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.mapping import Row

# Defaults of transformers, which published files leave out.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `gemma3_text` config.json of any Gemma 3 config.json."""
    if "text_config" not in config:
        return dict(config)
    return _complete(inner_text(config, "gemma3_text", "Gemma3ForCausalLM"))


def _complete(text: Mapping[str, Any]) -> dict[str, Any]:
    return {**_DEFAULTS, **{name: value for name, value in text.items() if value is not None}}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `gemma3_text` config.json."""
    config = _complete(text_config(config))
    for field in ("final_logit_softcapping", "attn_logit_softcapping"):
        refuse(config, field, unless=[None], reason="soft-capped logits are not supported")
    for field in ("attention_bias", "use_bidirectional_attention"):
        refuse(config, field, unless=[False, None], reason="Gemma 3 language models have it not")
    local, whole = _ropes(config)
    args = dense_args(config, activations=("gelu_pytorch_tanh",))
    args |= window_args(config, _local_layers(config))
    return args | {
        "swiglu": False,
        "bias_swiglu_fusion": False,
        "bias_gelu_fusion": False,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        "rotary_base": int(whole["rope_theta"]),
        "rotary_percent": 1.0,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "extras": {
            "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
            "embedding_scale": math.sqrt(config["hidden_size"]),
            "local_rotary_base": local["rope_theta"],
            "global_rope_factor": float(whole.get("factor", 1.0)),
            "local_layers": _local_layers(config),
        },
    }


def _local_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which layers have the sliding window and the local rope base."""
    if config.get("layer_types"):
        return sliding_layers(config)
    pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    return [bool((layer + 1) % pattern) for layer in range(config["num_hidden_layers"])]


def _ropes(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope parameters of local and of global layers, from files of transformers 4 and 5."""
    parameters = config.get("rope_parameters") or {}
    local = dict(parameters.get("sliding_attention") or {})
    whole = {**(parameters.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local["rope_theta"] = local.get("rope_theta") or config.get("rope_local_base_freq") or 10_000.0
    whole["rope_theta"] = whole.get("rope_theta") or config.get("rope_theta") or 1_000_000.0
    for rope, kinds in ((local, ["default"]), (whole, ["default", "linear"])):
        rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
        refuse(rope, "rope_type", unless=kinds, reason="Gemma 3 has no other rotary embedding")
    return local, whole


def _norm(key: str, name: str) -> Row:
    return Row(f"decoder.layers.{key}", (f"model.layers.{{}}.{name}.weight",), ("hidden",))


def _head_norm(letter: str) -> Row:
    return Row(
        f"decoder.layers.self_attention.{letter}_layernorm.weight",
        (f"model.layers.{{}}.self_attn.{letter}_norm.weight",),
        ("head_dim",),
    )


_LAYER_NORMS = ("mlp.linear_fc1.layer_norm_weight",)
ROWS = (
    *(row for row in llama.ROWS if not row.key.endswith(_LAYER_NORMS)),
    _head_norm("q"),
    _head_norm("k"),
    _norm("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm"),
    _norm("mlp.linear_fc1.layer_norm_weight", "pre_feedforward_layernorm"),
    _norm("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm"),
)


def _layers() -> Any:
    from megatron_infifpo.families.gemma3.layers import LAYERS

    return LAYERS


PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-3-12b": {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text",
            "num_attention_heads": 16, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
        },
    },
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED, text_config, language_name, _layers)
