"""Granite 3: Llama with numbers that embeddings, sublayers, attention and logits are scaled by."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, FamilyLayers, dense_args
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.ropes import rope_args

# Of transformers, which changes nothing where a file leaves them out, attention's products too.
_NUMBERS = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"), 1.0
)


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `granite` config.json."""
    for field in ("attention_bias", "mlp_bias"):
        refuse(config, field, unless=[False, None], reason="biased projections are not supported")
    numbers = {name: _number(config, name, default) for name, default in _NUMBERS.items()}
    scales = {
        "embedding_scale": numbers["embedding_multiplier"],
        "sublayer_scale": numbers["residual_multiplier"],
        "softmax_scale": numbers["attention_multiplier"],
        "logit_scale": 1.0 / numbers["logits_scaling"],
    }
    return dense_args(config) | rope_args(config) | {"extras": scales}


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    found = config.get(name, default)
    if type(found) not in (int, float) or not 0 < found < 1e6:
        raise UserError(f"config.json: {name} is {found!r}, expected a positive number")
    if name == "embedding_multiplier" and torch.tensor(found).bfloat16() != found:
        raise UserError(
            f"config.json: {name} is {found!r}, expected a number that bfloat16 has, as 12: "
            "embeddings would be scaled by another one"
        )
    return float(found)


def _layers() -> FamilyLayers:
    from megatron_infifpo.families import parts

    return FamilyLayers(
        configure=parts.configure,
        complete=parts.complete,
        embedding_scale=parts.embedding_scale,
    )


PUBLISHED: dict[str, dict[str, Any]] = {
    "granite-3.3-8b": {
        "model_type": "granite", "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12800,
        "logits_scaling": 16.0, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-5, "rope_theta": 10000000.0, "tie_word_embeddings": True,
        "vocab_size": 49159,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "granite": {
        "model_type": "granite",
        "tie_word_embeddings": True,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
        "logits_scaling": 4.0,
    },
}
FAMILY = Family(megatron_args, llama.ROWS, TINY, PUBLISHED, layers=_layers)
