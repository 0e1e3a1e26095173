"""What the Llama-like families share: reading `config.json`, and saying what is not supported."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.checkpoint.mapping import Row
from megatron_infifpo.cli import UserError

# Megatron hard-codes these of Llama 3's rope scaling; only the factor is an argument.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Family:
    """One architecture: its configuration and its tensors.

    Attributes:
        megatron_args: from `config.json` to Megatron arguments, by their argparse names.
        rows: every tensor of the model.
    """

    megatron_args: Callable[[Mapping[str, Any]], dict[str, Any]]
    rows: tuple[Row, ...]


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
        expected = " or ".join(repr(value) for value in unless if value is not None)
        raise UserError(
            f"config.json: {field} is {config[field]!r}, expected {expected or 'none'}: {reason}"
        )


def refuse_sliding_window(config: Mapping[str, Any], window: int | None) -> None:
    """Raise UserError if some layer does not see the whole context."""
    context = required(config, "max_position_embeddings")
    if window is not None and window < context:
        raise UserError(
            f"config.json: sliding_window is {window} in a context of {context}: "
            f"sliding-window attention of {config['model_type']} models is not supported"
        )


def rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rope parameters in the form of transformers 5, also from files of transformers 4."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    for field in ("rope_theta", "partial_rotary_factor"):
        if parameters.get(field) is None:
            parameters[field] = config.get(field)
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


def dense_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a pre-norm decoder with RMSNorm, SwiGLU and grouped queries."""
    refuse(
        config,
        "hidden_act",
        unless=["silu", "swish"],
        reason=f"{config['model_type']} models are converted to SwiGLU",
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
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        # The real vocabulary: Megatron pads it at run time to what the TP size needs.
        "padded_vocab_size": vocab,
        "vocab_size": vocab,
        "make_vocab_size_divisible_by": 128,
        "tokenizer_type": "NullTokenizer",
    }
