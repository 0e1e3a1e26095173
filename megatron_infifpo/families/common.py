"""What the Llama-like families share: reading `config.json`, and saying what is not supported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.mapping import Row

# Megatron hard-codes these of Llama 3's rope scaling; only the factor is an argument.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class FamilyLayers:
    """Where the layers of a model family differ from GPT layers of any kind; by default nowhere.

    Attributes:
        adapt: changes a layer's `ModuleSpec`, given the norm of the kind of layers.
        configure: sets in a `GPTModelConfig` what has no Megatron argument, from `extras`.
        complete: changes a built `GPTModel`, from `extras`.
        embedding_scale: what `complete` makes embeddings be multiplied by, rounded to their dtype,
            from `extras`.
    """

    adapt: Callable[[Any, Any], Any] = lambda layer, norm: layer
    configure: Callable[[Any, Mapping[str, Any]], None] = lambda config, extras: None
    complete: Callable[[Any, Mapping[str, Any]], None] = lambda model, extras: None
    embedding_scale: Callable[[Mapping[str, Any]], float] = lambda extras: 1.0


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration, its tensors, and what else differs.

    Attributes:
        megatron_args: from `config.json` to Megatron arguments, by their argparse names.
        rows: every tensor of the model.
        tiny: what differs in the config.json of tiny models that prove the family, by name; with a
            model_type.
        published: what shapes follow from in config.json files of published models, by name.
        text_config: the part of `config.json` that describes the language model, complete.
        hf_name: from a name in the Hugging Face files to the one in `rows`; None for a tensor that
            is no part of the language model.
        layers: where its layers differ from GPT layers. Called when a model is built: conversion
            and planning do not load Megatron's modules.
        one_layer: what differs in the config.json of a model that has just one layer of another
            one, from that one's and the layer; beside num_hidden_layers and layer_types.
    """

    megatron_args: Callable[[Mapping[str, Any]], dict[str, Any]]
    rows: tuple[Row, ...]
    tiny: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    text_config: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    hf_name: Callable[[str], str | None] = str
    layers: Callable[[], FamilyLayers] = FamilyLayers
    one_layer: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda config, layer: {}


def required(config: Mapping[str, Any], field: str) -> Any:
    """Return a field that `config.json` must have."""
    if config.get(field) is None:
        raise UserError(
            f"config.json of this {config.get('model_type')} model has no {field}: "
            "take the file from the model's original repository"
        )
    return config[field]


def refuse(config: Mapping[str, Any], field: str, *, unless: Sequence[Any], reason: str) -> None:
    """Raise UserError if a field has another value than these."""
    if config.get(field) not in unless:
        expected = " or ".join(repr(value) for value in unless if value is not None) or "none"
        raise UserError(
            f"config.json: {field} is {config.get(field)!r}, expected {expected}: {reason}"
        )


def window_args(config: Mapping[str, Any], layers: Sequence[bool] | None = None) -> dict[str, Any]:
    """Megatron arguments of sliding-window attention.

    Args:
        config: its sliding_window is the number of tokens that one sees, itself included.
        layers: which layers have it; default: all.
    """
    window = config.get("sliding_window")
    context = required(config, "max_position_embeddings")
    if window is None or window >= context or (layers is not None and not any(layers)):
        return {"window_size": None, "window_attn_skip_freq": None}
    some = layers is not None and not all(layers)
    # Megatron's list says for each layer whether it has the window.
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(layer) for layer in layers or ()] if some else None,
    }


def windowed_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which layers of a Qwen model have a sliding window: layer_types, or the last ones."""
    count = required(config, "num_hidden_layers")
    if not config.get("use_sliding_window"):
        return [False] * count
    if config.get("layer_types"):
        return sliding_layers(config)
    first = 28 if config.get("max_window_layers") is None else config["max_window_layers"]
    return [layer >= first for layer in range(count)]


def sliding_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which of the layer_types are sliding_attention.

    Raises:
        UserError: not one for each layer, or another kind.
    """
    kinds, count = config["layer_types"], required(config, "num_hidden_layers")
    if len(kinds) != count:
        raise UserError(f"config.json: layer_types has {len(kinds)} entries for {count} layers")
    for kind in kinds:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(
                f"config.json: layer_types has {kind!r}, expected sliding_attention or "
                "full_attention: Megatron has no other kind"
            )
    return [kind == "sliding_attention" for kind in kinds]


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters in the form of transformers 5, also from files of transformers 4."""
    # Where a file has both, rope_scaling is what somebody added, and transformers follows it.
    parameters = {**(config.get("rope_parameters") or {}), **(config.get("rope_scaling") or {})}
    for name in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(name) is None:
            parameters[name] = config.get(name)
    parameters["rope_theta"] = parameters["rope_theta"] or 10000.0
    parameters["partial_rotary_factor"] = parameters["partial_rotary_factor"] or 1.0
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    return parameters


def rope_args(
    config: Mapping[str, Any], *, types: Sequence[str] = ("default",), partial: bool = False
) -> dict[str, Any]:
    """Megatron arguments of the rotary embedding.

    Args:
        types: rope types that the family may have: default, llama3.
        partial: the family may rotate only a part of each head.

    Raises:
        UserError: a rope that Megatron's GPTModel would compute otherwise.
    """
    parameters = rope(config)
    kind, percent = parameters["rope_type"], parameters["partial_rotary_factor"]
    refuse(
        parameters,
        "rope_type",
        unless=types,
        reason="longrope needs factors per frequency and a switch at run time, and Megatron's "
        "GPTModel has neither"
        if kind in ("longrope", "su")
        else "Megatron's rotary embedding would compute other angles",
    )
    if kind == "llama3":
        for field, value in LLAMA3_ROPE.items():
            refuse(parameters, field, unless=[value], reason="Megatron hard-codes this value")
    if not partial and percent != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor is {percent}, expected 1.0: "
            f"{config['model_type']} models rotate whole heads"
        )
    theta = parameters["rope_theta"]
    return {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,
        # Megatron's flag is an integer; a fraction would be one only in a broken file.
        "rotary_base": int(theta) if theta == int(theta) else theta,
        "rotary_percent": float(percent),
        "use_rope_scaling": kind == "llama3",
        "rope_scaling_factor": float(required(parameters, "factor")) if kind == "llama3" else 8.0,
    }


def dense_args(config: Mapping[str, Any], activations: Sequence[str] = ("silu", "swish")) -> dict:
    """Megatron arguments of a pre-norm decoder with RMSNorm, SwiGLU and grouped queries."""
    name = "hidden_activation" if config.get("hidden_activation") else "hidden_act"
    refuse(
        config,
        name,
        unless=activations,
        reason=f"{config['model_type']} models are converted with this activation only",
    )
    heads = required(config, "num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(
            f"config.json: num_attention_heads {heads} is not a multiple of "
            f"num_key_value_heads {groups}"
        )
    hidden = required(config, "hidden_size")
    vocab = required(config, "vocab_size")
    return {
        "num_layers": required(config, "num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": required(config, "intermediate_size"),
        "num_attention_heads": heads,
        "group_query_attention": groups != heads,
        "num_query_groups": groups,
        "kv_channels": config.get("head_dim") or hidden // heads,
        "max_position_embeddings": required(config, "max_position_embeddings"),
        "swiglu": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": required(config, "rms_norm_eps"),
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "layernorm_zero_centered_gamma": False,
        "window_size": None,
        "window_attn_skip_freq": None,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        # The real vocabulary: Megatron pads it at run time to what the TP size needs.
        "padded_vocab_size": vocab,
        "vocab_size": vocab,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "NullTokenizer",
        "family": config["model_type"],
        # What the family's layers read beyond Megatron's arguments.
        "extras": {},
    }
