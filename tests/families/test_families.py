"""From config.json to Megatron arguments: real configurations, both generations of rope fields."""

import dataclasses
import math
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import (
    FAMILIES,
    check_tensor_parallel,
    megatron_args,
    tensor_parallel_sizes,
    weight_mapping,
)

PHI4: dict[str, Any] = {
    "model_type": "phi3",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 100352,
}
LLAMA31: dict[str, Any] = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


def test_phi4():
    args = megatron_args(PHI4)
    assert args["num_query_groups"] == 10 and args["group_query_attention"] is True
    assert args["kv_channels"] == 128 and args["rotary_base"] == 250000
    assert args["rotary_percent"] == 1.0 and args["use_rope_scaling"] is False
    assert args["untie_embeddings_and_output_weights"] is True
    assert args["padded_vocab_size"] == args["vocab_size"] == 100352
    parameters = sum(math.prod(entry.shape) for entry in weight_mapping(PHI4).entries())
    assert parameters == 14_659_507_200


def test_phi4_tensor_parallel_sizes():
    args = megatron_args(PHI4)
    assert tensor_parallel_sizes(args) == [1, 2, 5, 10]
    check_tensor_parallel(args, 5)
    with pytest.raises(UserError, match="is 4, expected one of 1, 2, 5, 10: .* 10 key-value heads"):
        check_tensor_parallel(args, 4)


def test_phi3_rope():
    assert megatron_args({**PHI4, "partial_rotary_factor": 0.75})["rotary_percent"] == 0.75
    new = {**PHI4, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    assert megatron_args(new)["rotary_percent"] == 0.5
    assert megatron_args(new)["rotary_base"] == 10000
    for kind in ({"type": "longrope"}, {"rope_type": "longrope"}, {"type": "su"}):
        with pytest.raises(UserError, match="short_factor of its rope is None, expected 64"):
            megatron_args({**PHI4, "rope_scaling": kind})


def test_llama3_rope():
    args = megatron_args(LLAMA31)
    assert args["use_rope_scaling"] is True and args["rope_scaling_factor"] == 32.0
    assert args["layernorm_epsilon"] == 1e-6 and args["rotary_base"] == 500000
    # Megatron hard-codes these: frequencies are ours where a model has others.
    for field, value in (
        ("low_freq_factor", 2.0),
        ("high_freq_factor", 8.0),
        ("original_max_position_embeddings", 4096),
    ):
        other = megatron_args(
            {**LLAMA31, "rope_scaling": {**LLAMA31["rope_scaling"], field: value}}
        )
        assert other["use_rope_scaling"] is False and other["rope"][field] == value
    with pytest.raises(UserError, match="no factor"):
        scaling = {k: v for k, v in LLAMA31["rope_scaling"].items() if k != "factor"}
        megatron_args({**LLAMA31, "rope_scaling": scaling})


def test_llama_biases_are_refused():
    for field in ("attention_bias", "mlp_bias"):
        with pytest.raises(UserError, match=f"{field} is True, expected False"):
            megatron_args({**LLAMA31, field: True})


def test_every_argument_is_one_of_megatrons(ranks):
    """A misspelt argument would be ignored: norm_epsilon, say, is layernorm_epsilon."""
    known = ranks(1, "support.conversion:megatron_argument_names")[0]
    # Three are ours: the family, and what it has and Megatron has no argument for.
    yarn = {"type": "yarn", "factor": 2.0}
    for config in (LLAMA31, {"model_type": "gemma3_text"}, {**LLAMA31, "rope_scaling": yarn}):
        assert megatron_args(config).keys() <= {*known, "family", "extras", "rope"}


def test_a_defect_of_a_family_does_not_blame_the_file(monkeypatch):
    """A key that our own code looks for in vain is nothing that a user can mend."""
    broken = dataclasses.replace(
        FAMILIES["phi3"], megatron_args=lambda config: dict(config)["no such key"]
    )
    monkeypatch.setitem(FAMILIES, "phi3", broken)
    with pytest.raises(KeyError, match="no such key"):
        megatron_args(PHI4)
