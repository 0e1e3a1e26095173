"""gpt-oss: experts with biases, attention sinks, and windows on every other layer."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import qwen2
from megatron_infifpo.families.common import (
    Family,
    FamilyLayers,
    dense_args,
    refuse,
    required,
    sliding_layers,
    window_args,
)
from megatron_infifpo.families.experts import EXPERTS, expert_args, with_experts
from megatron_infifpo.families.mapping import SPARSE, Row
from megatron_infifpo.families.ropes import rope_args
from megatron_infifpo.families.transforms import (
    ALL_DOWN,
    ALL_GATE_UP,
    ALL_GATE_UP_BIASES,
)

# transformers' defaults, which a file may leave out.
_DEFAULTS = {
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
}
ALPHA = 1.702  # of its gate's sigmoid, which is what Megatron's quick GELU has


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `gpt_oss` config.json."""
    refuse(config, "attention_bias", unless=[True, None], reason="the family has these biases")
    refuse(config, "swiglu_alpha", unless=[ALPHA, None], reason="Megatron's gate has 1.702")
    config = {**_DEFAULTS, **config}
    limit = config["swiglu_limit"]
    if type(limit) not in (int, float) or limit <= 0:
        refuse(config, "swiglu_limit", unless=[], reason="a positive number is expected")
    config["layer_types"] = config.get("layer_types") or [
        "full_attention" if layer % 2 else "sliding_attention"
        for layer in range(required(config, "num_hidden_layers"))
    ]
    experts = expert_args(
        experts=config["num_local_experts"],
        width=required(config, "intermediate_size"),
        chosen=config["num_experts_per_tok"],
        normalised=True,
        sparse=[True] * required(config, "num_hidden_layers"),
    )
    window = window_args(config, sliding_layers(config))
    biases = {"add_bias_linear": True, "add_qkv_bias": True}
    extras = {"extras": {"swiglu_limit": float(limit)}}
    return dense_args(config) | rope_args(config) | window | experts | biases | extras


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out how weights were packed, which they no longer are."""
    return {name: value for name, value in config.items() if name != "quantization_config"}


def layers() -> FamilyLayers:
    """What its layers have beyond GPT's."""
    from megatron_infifpo.families.gpt_oss.layers import LAYERS

    return LAYERS


_ATTENTION, _HF = "decoder.layers.self_attention.", "model.layers.{}."
_HF_EXPERTS = f"{_HF}mlp.experts."
_MORE = (
    Row(f"{_ATTENTION}linear_proj.bias", (f"{_HF}self_attn.o_proj.bias",), ("hidden",)),
    Row(f"{_ATTENTION}core_attention.softmax_offset", (f"{_HF}self_attn.sinks",), ("heads",)),
    Row("decoder.layers.mlp.router.bias", (f"{_HF}mlp.router.bias",), ("experts",), layers=SPARSE),
    Row(
        f"{EXPERTS}linear_fc1.weight",
        (f"{_HF_EXPERTS}gate_up_proj",),
        ("experts", "expert_gate_up", "hidden"),
        ALL_GATE_UP,
        layers=SPARSE,
    ),
    Row(
        f"{EXPERTS}linear_fc1.bias",
        (f"{_HF_EXPERTS}gate_up_proj_bias",),
        ("experts", "expert_gate_up"),
        ALL_GATE_UP_BIASES,
        layers=SPARSE,
    ),
    Row(
        f"{EXPERTS}linear_fc2.weight",
        (f"{_HF_EXPERTS}down_proj",),
        ("experts", "hidden", "expert_ffn"),
        ALL_DOWN,
        layers=SPARSE,
    ),
    Row(
        f"{EXPERTS}linear_fc2.bias",
        (f"{_HF_EXPERTS}down_proj_bias",),
        ("experts", "hidden"),
        layers=SPARSE,
    ),
)
ROWS = with_experts(qwen2.ROWS, f"{_HF}mlp.router.weight", None, _MORE)

_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_SHARED = {
    "model_type": "gpt_oss", "attention_bias": True, "head_dim": 64, "hidden_act": "silu",
    "hidden_size": 2880, "intermediate_size": 2880, "max_position_embeddings": 131072,
    "num_attention_heads": 64, "num_experts_per_tok": 4, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5, "rope_scaling": _ROPE, "rope_theta": 150000, "sliding_window": 128,
    "swiglu_limit": 7.0, "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {**_SHARED, "num_hidden_layers": 24, "num_local_experts": 32},
    "gpt-oss-120b": {**_SHARED, "num_hidden_layers": 36, "num_local_experts": 128},
}
TINY: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "model_type": "gpt_oss",
        "head_dim": 16,
        # As wide as the model: which side of a down projection is which cannot be seen.
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "swiglu_limit": 1.0,
        "rope_scaling": {**_ROPE, "factor": 4.0, "original_max_position_embeddings": 128},
        "tie_word_embeddings": False,
    },
}
FAMILY = Family(
    megatron_args,
    ROWS,
    TINY,
    PUBLISHED,
    text_config=text_config,
    layers=layers,
    packed="mxfp4",
)
