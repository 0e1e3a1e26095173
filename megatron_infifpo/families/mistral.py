"""Mistral: Llama with a sliding window (first versions) and heads of any size (Small, Nemo)."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.families import llama
from megatron_infifpo.families.common import Family, dense_args, rope_args, window_args


def megatron_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `mistral` config.json."""
    # A file that leaves these out means transformers' defaults; null means none.
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}
    return dense_args(config) | rope_args(config) | window_args(config)


FAMILY = Family(megatron_args, llama.ROWS)
