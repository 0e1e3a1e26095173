"""Qwen2 with experts: many small MLPs, and a gated one that all tokens go to."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import qwen2
from megatron_infifpo.families.common import Family, refuse
from megatron_infifpo.families.experts import (
    expert_args,
    one_sparse_layer,
    sparse_layers,
    with_experts,
)
from megatron_infifpo.families.mapping import SPARSE, Row
from megatron_infifpo.families.qwen3_moe import EXPERTS, count_of_experts
from megatron_infifpo.families.transforms import GATE_UP

# transformers' defaults, which a file may leave out.
_DEFAULTS = {
    "num_experts": 60,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `qwen2_moe` config.json."""
    refuse(config, "qkv_bias", unless=[True, None], reason="the family has these biases")
    refuse(
        config,
        "use_sliding_window",
        unless=[False, None],
        reason="versions of transformers disagree about which layers have the window",
    )
    config = {**_DEFAULTS, **config, "layer_types": None}
    experts = expert_args(
        experts=count_of_experts(config),
        width=config["moe_intermediate_size"],
        chosen=config["num_experts_per_tok"],
        normalised=bool(config.get("norm_topk_prob", False)),
        sparse=sparse_layers(config),
    )
    shared = {
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }
    return qwen2.megatron_args(config) | experts | shared


_SHARED, _HF_SHARED = "decoder.layers.mlp.shared_experts.", "model.layers.{}.mlp.shared_expert"
ROWS = with_experts(
    qwen2.ROWS,
    "model.layers.{}.mlp.gate.weight",
    (
        f"{EXPERTS}gate_proj.weight",
        f"{EXPERTS}up_proj.weight",
        f"{EXPERTS}down_proj.weight",
    ),
    (
        Row(
            f"{_SHARED}linear_fc1.weight",
            (f"{_HF_SHARED}.gate_proj.weight", f"{_HF_SHARED}.up_proj.weight"),
            ("shared_gate_up", "hidden"),
            GATE_UP,
            layers=SPARSE,
        ),
        Row(
            f"{_SHARED}linear_fc2.weight",
            (f"{_HF_SHARED}.down_proj.weight",),
            ("hidden", "shared_ffn"),
            layers=SPARSE,
        ),
        Row(
            f"{_SHARED}gate_weight",
            (f"{_HF_SHARED}_gate.weight",),
            ("one", "hidden"),
            layers=SPARSE,
        ),
    ),
)

TINY: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 56,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": False,
    },
}
FAMILY = Family(megatron_args, ROWS, TINY, one_layer=one_sparse_layer)
