"""Which models can be planned: those of the families, and mixtures of experts that are none yet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_infifpo.families import FAMILIES, PUBLISHED, megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.common import dense_args, required

# What shapes follow from in config.json files of published models that no family has.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.3-70b": {
        "model_type": "llama", "head_dim": 128, "hidden_act": "silu", "hidden_size": 8192,
        "intermediate_size": 28672, "max_position_embeddings": 131072, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 151936,
    },
}  # fmt: skip
NAMES = (*PUBLISHED, *MODELS)


def planned_model(name: str) -> dict[str, Any]:
    """Return Megatron's arguments of a model: of a folder, or of one of `NAMES`.

    Raises:
        UserError: there is no such folder, or an architecture that is not known.
    """
    if name in NAMES and not Path(name).is_dir():
        return planned_args({**PUBLISHED, **MODELS}[name])
    return planned_args(read_hf_config(name))


def planned_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """From a `config.json` to Megatron's arguments, for planning.

    A family's own where there is one; else the sizes of a mixture of experts, which can be planned
    though it cannot be converted.

    Raises:
        UserError: an architecture that is not known, or a field that is missing.
    """
    kind = config.get("model_type")
    read = None if kind in FAMILIES else EXPERTS.get(str(kind))
    return megatron_args(config) if read is None else dense_args(config) | read(config)


def _qwen3_moe(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments of experts: some layers have one MLP instead."""
    every, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    layers = range(required(config, "num_hidden_layers"))
    return {
        "num_experts": required(config, "num_experts"),
        "moe_ffn_hidden_size": required(config, "moe_intermediate_size"),
        "moe_router_topk": required(config, "num_experts_per_tok"),
        "moe_layer_freq": [int(i not in dense and (i + 1) % every == 0) for i in layers],
    }


def _mixtral(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments of experts: every layer has them."""
    return {
        "num_experts": required(config, "num_local_experts"),
        "moe_ffn_hidden_size": required(config, "intermediate_size"),
        "moe_router_topk": required(config, "num_experts_per_tok"),
        "moe_layer_freq": [1] * required(config, "num_hidden_layers"),
    }


EXPERTS = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral}
