"""Mixtral: Mistral whose layers all have a few large experts."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import mistral
from megatron_infifpo.families.common import Family, refuse, required
from megatron_infifpo.families.experts import expert_args, with_experts

# transformers' defaults, which a file may leave out.
_DEFAULTS = {"sliding_window": None, "num_experts_per_tok": 2, "num_local_experts": 8}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `mixtral` config.json."""
    refuse(
        config,
        "router_jitter_noise",
        unless=[0, 0.0, None],
        reason="log-probs would depend on chance",
    )
    config = {**_DEFAULTS, **config}
    experts = expert_args(
        experts=config["num_local_experts"],
        width=required(config, "intermediate_size"),
        chosen=config["num_experts_per_tok"],
        normalised=True,
        sparse=[True] * required(config, "num_hidden_layers"),
    )
    return mistral.megatron_args(config) | experts


_MOE = "model.layers.{}.block_sparse_moe."
ROWS = with_experts(
    mistral.FAMILY.rows,
    f"{_MOE}gate.weight",
    tuple(f"{_MOE}experts.{{}}.w{number}.weight" for number in (1, 3, 2)),  # type: ignore[arg-type]
)

PUBLISHED: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "sliding_window": None, "tie_word_embeddings": False, "vocab_size": 32000,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        "tie_word_embeddings": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
FAMILY = Family(megatron_args, ROWS, TINY, PUBLISHED)
