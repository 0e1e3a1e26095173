"""Scaled rotary embeddings: frequencies of transformers to the bit, and what is refused."""

from typing import Any

import pytest
import torch

from megatron_infifpo.convert.fingerprint import computation
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import PUBLISHED, megatron_args
from megatron_infifpo.families.ropes import inverse_frequencies

QWEN: dict[str, Any] = {**PUBLISHED["qwen2.5-math-7b"], "max_position_embeddings": 32768}
MINI: dict[str, Any] = {**PUBLISHED["phi-4-mini"]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
OLD_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
SHORT = {name: MINI["rope_scaling"][name] for name in ("short_factor", "long_factor")}

# name -> config.json. As Qwen, Llama, DeepSeek, gpt-oss, Ministral and Microsoft publish them.
CONFIGS: dict[str, dict[str, Any]] = {
    "yarn": {**QWEN, "rope_scaling": OLD_YARN},
    "yarn-qwen3": {**QWEN, "model_type": "qwen3", "rope_scaling": YARN},
    "yarn-llama": {**QWEN, "model_type": "llama", "rope_parameters": {**YARN, "rope_theta": 5e5}},
    "yarn-mscale": {**QWEN, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
    "yarn-factor": {**QWEN, "rope_scaling": {**YARN, "attention_factor": 1.5, "beta_fast": 16}},
    "yarn-untruncated": {**QWEN, "rope_scaling": {**YARN, "truncate": False, "beta_slow": 2.0}},
    "yarn-narrow": {**QWEN, "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}},
    "yarn-outside": {**QWEN, "rope_scaling": {"type": "yarn", "factor": 2.0,
                     "original_max_position_embeddings": 99},
                     "original_max_position_embeddings": 16384},
    "yarn-whole-context": {**QWEN, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "linear": {**QWEN, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 3.0}},
    "llama3-other": {**QWEN, "model_type": "llama", "rope_scaling": {
                     **LLAMA3, "high_freq_factor": 3.0, "original_max_position_embeddings": 4096}},
    "granite-yarn": {**PUBLISHED["granite-3.3-8b"], "rope_scaling": YARN},
    "longrope": MINI,
    "longrope-su": {**MINI, "rope_scaling": {
                    **SHORT, "type": "su", "original_max_position_embeddings": 4096}},
    "longrope-factor": {**MINI, "rope_scaling": {**SHORT, "type": "longrope", "factor": 7.0}},
    "longrope-scale": {**MINI, "rope_scaling": {
                       **SHORT, "type": "longrope", "attention_factor": 1.3}},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_are_those_of_transformers(name):
    """To the bit, and the factor of cosines and sines; at the sizes of published models."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS[name]
    made = AutoConfig.for_model(**{**config, "num_hidden_layers": 1})
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(made).model.rotary_emb)
    theirs, rope = kind(made), megatron_args(config)["rope"]
    ours = inverse_frequencies(rope, 2 * len(theirs.inv_freq))
    assert torch.equal(ours, theirs.inv_freq)
    assert rope["attention_factor"] == theirs.attention_scaling
    plain = inverse_frequencies({**rope, "rope_type": "default"}, 2 * len(ours))
    # Phi-4-mini's own factors of short texts are all 1: only its cosines and sines differ.
    assert not torch.equal(ours, plain) or rope["attention_factor"] != 1.0


def test_a_longrope_has_one_list():
    """That of short texts, which ends the context; or both, where they are equal."""
    assert megatron_args(MINI)["max_position_embeddings"] == 4096
    factors = MINI["rope_scaling"]["long_factor"]
    both = {**MINI["rope_scaling"], "short_factor": factors}
    args = megatron_args({**MINI, "rope_scaling": both})
    assert args["max_position_embeddings"] == 131072
    assert args["rope"]["factors"] == tuple(map(float, factors))


def test_a_rope_is_a_part_of_what_a_model_is():
    """Its fingerprint has it, however a version of transformers writes it."""
    new = {**QWEN, "rope_parameters": {**YARN, "rope_theta": 10000.0}}
    assert computation(new) == computation(CONFIGS["yarn"]) != computation(QWEN)
    other = {**YARN, "factor": 4.5}
    assert computation({**QWEN, "rope_scaling": other}) != computation(CONFIGS["yarn"])
    assert "rope" not in computation(QWEN)


@pytest.mark.parametrize(
    "config, message",
    [
        ({**QWEN, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "longest text of a row"),
        ({**QWEN, "rope_scaling": {**SHORT, "type": "longrope"}}, "no factors per frequency"),
        ({**QWEN, "rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta"),
        ({**QWEN, "rope_scaling": {"type": "default", "mrope_section": [16]}}, "mrope_section"),
        ({**QWEN, "rope_scaling": {**YARN, "factor": None}}, "has no factor"),
        ({**QWEN, "rope_scaling": {**YARN, "factor": "4"}}, "has '4' as factor"),
        (
            {**QWEN, "rope_scaling": {**YARN, "original_max_position_embeddings": 0}},
            "is 0, expected a positive integer",
        ),
        (
            {**QWEN, "rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e6}},
            "leave out rope_theta 1000000.0",
        ),
        ({**QWEN, "model_type": "llama", "rope_scaling": LLAMA3 | {"factor": 0}}, "0 as factor"),
        (
            {**MINI, "rope_scaling": {**MINI["rope_scaling"], "short_factor": [1.0]}},
            "short_factor of its rope is 1 values, expected 48 numbers",
        ),
        ({**MINI, "rope_scaling": {"type": "longrope"}}, "short_factor of its rope is None"),
        ({**MINI, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ],
)
def test_other_ropes_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        megatron_args(config)
