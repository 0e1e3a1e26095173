"""OLMo 3: OLMo 2 with a sliding window on most layers, and a scaled rope on the others alone."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import olmo2
from megatron_infifpo.families.common import Family, sliding_layers, window_args
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.ropes import plain, rope_args

_THETA = 500_000.0  # transformers' default


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of an `olmo3` config.json."""
    config = {"sliding_window": 4096, **config}
    args = olmo2.common_args(config)
    if not config.get("layer_types"):
        kinds = ("sliding_attention",) * 3 + ("full_attention",)
        config["layer_types"] = [kinds[layer % 4] for layer in range(args["num_layers"])]
    sliding = sliding_layers(config)
    whole, local = _ropes(config)
    shared = rope_args({**config, "rope_scaling": None, "rope_parameters": local})
    extras = {**args["extras"], "ropes": (whole, plain(shared["rotary_base"]))}
    extras["of_layers"] = [int(layer) for layer in sliding]
    return args | shared | window_args(config, sliding) | {"extras": extras}


def _ropes(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rope of layers without a window, and parameters of the others' rope.

    Raises:
        UserError: a rope that transformers would take for another one than the file says.
    """
    nested = config.get("rope_parameters") or {}
    if flat := [name for name in nested if name not in ("full_attention", "sliding_attention")]:
        raise UserError(
            f"config.json: rope_parameters has {flat[0]}, expected full_attention and "
            "sliding_attention: transformers would leave out the rest"
        )
    whole = {**(nested.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = dict(nested.get("sliding_attention") or {})
    for parameters in (whole, local):
        theta = config.get("rope_theta")
        if parameters.get("rope_theta") is None and theta not in (None, _THETA):
            # transformers 5 takes rope_theta for some layers, and its default for the others
            raise UserError(
                f"config.json: rope_theta is {theta!r}, expected {_THETA}: say in rope_parameters "
                "what full_attention and sliding_attention have"
            )
        parameters.setdefault("rope_theta", _THETA)
    refuse(whole, "truncate", unless=[True, None], reason="transformers would not follow it")
    refuse(
        {"rope_type": "default", **local},
        "rope_type",
        unless=["default"],
        reason="layers with a window have no scaled rope",
    )
    parts = {**config, "rope_scaling": None, "rope_parameters": whole}
    args = rope_args(parts, megatrons=False)
    return args.get("rope") or plain(args["rotary_base"]), local


TINY: dict[str, dict[str, Any]] = {
    "olmo3": {
        "model_type": "olmo3",
        "tie_word_embeddings": False,
        "sliding_window": 16,
        "rms_norm_eps": 1e-3,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "olmo-3-7b": {
        "model_type": "olmo3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
        "intermediate_size": 11008, "max_position_embeddings": 65536, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0,
            "factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn",
        },
        "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
        "vocab_size": 100278,
    },
}  # fmt: skip
FAMILY = Family(megatron_args, olmo2.ROWS, TINY, PUBLISHED, layers=olmo2.layers)
