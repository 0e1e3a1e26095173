"""What the Llama-like families share: reading `config.json`, and saying what is not supported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.fields import refuse, required
from megatron_infifpo.families.mapping import Row


class LayerParts(NamedTuple):
    """What layers of a kind are made of.

    Attributes:
        norm: of heads and of outputs, built with the configuration, a size and eps.
        column: a column-parallel linear layer without a norm in it.
    """

    norm: Any
    column: Any


@dataclass(frozen=True)
class FamilyLayers:
    """Where the layers of a model family differ from GPT layers of any kind; by default nowhere.

    Attributes:
        adapt: changes a layer's `ModuleSpec`, given the parts of the kind of layers.
        configure: sets in a `GPTModelConfig` what has no Megatron argument, from `extras`.
        complete: changes a built `GPTModel`, from `extras`.
        embedding_scale: what `complete` makes embeddings be multiplied by, rounded to their dtype,
            from `extras`.
    """

    adapt: Callable[[Any, LayerParts], Any] = lambda layer, parts: layer
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
        packed: the quantization (`quant_method`) that published weights have and converters undo.
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
    packed: str | None = None
    one_layer: Callable[[Mapping[str, Any], int], dict[str, Any]] = lambda config, layer: {}


def inner_text(config: Mapping[str, Any], model_type: str, architecture: str) -> dict[str, Any]:
    """Return config.json of the language model inside a model that also reads images.

    Args:
        config: with a text_config.
        model_type, architecture: of the language model.
    """
    outer = ("eos_token_id", "bos_token_id", "pad_token_id", "torch_dtype", "dtype")
    text = {name: config[name] for name in outer if name in config} | config["text_config"]
    return text | {"model_type": model_type, "architectures": [architecture]}


def language_name(name: str) -> str | None:
    """Name of a tensor in a text-only checkpoint, from that in one of a model with images."""
    if any(part in name for part in ("vision_tower.", "multi_modal_projector.")):
        return None
    return name.removeprefix("language_model.").replace("model.language_model.", "model.")


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
