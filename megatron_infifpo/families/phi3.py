"""Phi-3 and Phi-4: fused projections, and a rotary embedding on a part of each head or all of it.

Phi-4 has 10 key-value heads, so TP may be 1, 2, 5 or 10.

Phi-4-mini and the long versions of Phi-3 have longrope: a factor for each frequency, from one list
for texts of up to original_max_position_embeddings tokens and from another for longer ones. Here a
model has one list, since responses of one prompt share its keys: that of short texts, and its
context ends where they do. One whose lists are equal has no such limit.
"""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, dense_args, window_args
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.ropes import rope, rope_args
from megatron_infifpo.families.transforms import FUSED_QKV


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `phi3` config.json."""
    config = _with_longrope(config)
    turned = rope_args(config, partial=True, types=("default", "longrope"))
    args = dense_args(config) | turned | window_args(config)
    longrope = args.get("rope")
    if longrope is not None and not longrope.pop("one_list"):
        context = args["max_position_embeddings"]
        args["max_position_embeddings"] = min(context, longrope["original_max_position_embeddings"])
    return args


def _with_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in what transformers does for a rope of type longrope, which older files call su."""
    renamed = {
        name: {**config[name], "rope_type": "longrope", "type": None}
        for name in ("rope_scaling", "rope_parameters")
        if rope(config)["rope_type"] in _LONGROPE and config.get(name)
    }
    return {"original_max_position_embeddings": 4096, **config, **renamed}


_LONGROPE = ("longrope", "su", "yarn")


_FUSED = (
    Row(
        "decoder.layers.self_attention.linear_qkv.weight",
        ("model.layers.{}.self_attn.qkv_proj.weight",),
        ("qkv", "hidden"),
        FUSED_QKV,
    ),
    # Both hold the gate, then the up projection.
    Row(
        "decoder.layers.mlp.linear_fc1.weight",
        ("model.layers.{}.mlp.gate_up_proj.weight",),
        ("gate_up", "hidden"),
    ),
)
ROWS = tuple({row.key: row for row in (*llama.ROWS, *_FUSED)}.values())

PUBLISHED: dict[str, dict[str, Any]] = {
    "phi-4": {
        "model_type": "phi3", "hidden_act": "silu", "hidden_size": 5120,
        "intermediate_size": 17920, "max_position_embeddings": 16384, "num_attention_heads": 40,
        "num_hidden_layers": 40, "num_key_value_heads": 10, "rms_norm_eps": 1e-5,
        "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
        "vocab_size": 100352, "pad_token_id": 100349,
    },
    "phi-4-mini": {
        "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 24,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope", "short_factor": [1.0] * 48,
            "long_factor": [
                1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817,
                2.187582649, 2.446418898, 2.735880826, 3.059592084, 3.421605075, 3.826451687,
                4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894,
                8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
                16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884,
                32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97,
                33.28, 33.49, 33.5, 44.16, 47.77,
            ],
        },
        "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "phi3": {"model_type": "phi3", "tie_word_embeddings": False},
    "phi3-partial": {
        "model_type": "phi3",
        "tie_word_embeddings": False,
        "partial_rotary_factor": 0.5,
    },
    "phi3-window": {"model_type": "phi3", "tie_word_embeddings": False, "sliding_window": 16},
    "phi3-longrope": {
        "model_type": "phi3",
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.5, 4.0],
            "long_factor": [2.0, 8.0, 30.0],
        },
    },
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED)
