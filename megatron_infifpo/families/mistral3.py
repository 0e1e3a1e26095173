"""Mistral 3 (Mistral-Small 3.1 and 3.2): the language model, which is a Mistral."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama, mistral
from megatron_infifpo.families.common import Family, inner_text, language_name
from megatron_infifpo.families.fields import refuse


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `mistral` config.json of a Mistral 3 config.json."""
    inner = config.get("text_config")
    refuse(
        inner or {},
        "model_type",
        unless=["mistral", None] if inner else ["mistral"],
        reason="of models that also read images only those with a Mistral as text_config are "
        "converted",
    )
    return inner_text(config, "mistral", "MistralForCausalLM")


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of the `mistral` inside a `mistral3` config.json."""
    return mistral.megatron_args(text_config(config))


PUBLISHED: dict[str, dict[str, Any]] = {
    "mistral-small-3.1-24b": {
        "model_type": "mistral3",
        "text_config": {
            "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
            "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5, "rope_theta": 1000000000.0, "sliding_window": None,
            "vocab_size": 131072,
        },
    },
}  # fmt: skip
FAMILY = Family(
    megatron_args,
    llama.ROWS,
    published=PUBLISHED,
    text_config=text_config,
    hf_name=language_name,
)
