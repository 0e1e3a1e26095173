"""SmolLM3: Llama with some layers whose heads are not rotated."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, FamilyLayers, dense_args
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.ropes import NONE, plain, rope_args

# Defaults of transformers.
_DEFAULTS = {
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "no_rope_layer_interval": 4,
    "rope_theta": 2_000_000.0,
}


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `smollm3` config.json."""
    for field in ("attention_bias", "mlp_bias", "use_sliding_window"):
        refuse(config, field, unless=[False, None], reason="it is not supported")
    config = {**_DEFAULTS, **config}
    turned = rope_args(config, megatrons=False)
    whole = turned.pop("rope", None) or plain(turned["rotary_base"])
    args = dense_args(config) | turned
    # Which layers are not rotated: transformers' list says 0 of them.
    still = [int(not kept) for kept in _rotated(config, args["num_layers"])]
    return args | {"extras": {"ropes": (whole, NONE), "of_layers": still}}


def _rotated(config: Mapping[str, Any], layers: int) -> list[int]:
    given = config.get("no_rope_layers")
    if given is None:
        every = config["no_rope_layer_interval"]
        return [int((layer + 1) % every != 0) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(x not in (0, 1) for x in given):
        raise UserError(
            f"config.json: no_rope_layers is {given!r}, expected 0 or 1 for each of {layers} layers"
        )
    return given[:layers]


def _layers() -> FamilyLayers:
    from megatron_infifpo.families import parts

    return FamilyLayers(parts.with_layer_ropes, parts.configure, parts.complete)


PUBLISHED: dict[str, dict[str, Any]] = {
    "smollm3-3b": {
        "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 11008, "max_position_embeddings": 65536,
        "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 128256,
    },
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "tie_word_embeddings": True},
}
FAMILY = Family(megatron_args, llama.ROWS, TINY, PUBLISHED, layers=_layers)
