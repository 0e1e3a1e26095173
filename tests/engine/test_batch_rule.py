"""A text's numbers are its own: for every rope, whatever stands in the batch or came before it."""

import copy
import itertools
import random
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_infifpo.engine.batch_rule import BatchRule
from megatron_infifpo.scoring.transformers_backend import TransformersBackend

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "initializer_range": 0.3, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
    "max_position_embeddings": 24,
}  # fmt: skip
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2, 3, 4, 6, 8, 12.0]}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 24, **FACTORS}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24}
ROPES: dict[str, Any] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 24},
    "longrope": LONG,
    "llama3": {"factor": 8.0, **LLAMA3},
    "proportional": {"partial_rotary_factor": 0.5},
}
BY_LAYER = {
    "sliding_attention": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    "full_attention": {**LONG, "rope_theta": 10000.0},
}
OTHERS: dict[str, Any] = {
    "phi3-longrope": (Phi3Config, Phi3ForCausalLM, {"rope_parameters": {**LONG, "rope_theta": 1e4},
                      "original_max_position_embeddings": 24, "max_position_embeddings": 96}),
    "phimoe-longrope": (PhimoeConfig, PhimoeForCausalLM, {"rope_parameters":
                        {**LONG, "rope_theta": 1e4, "short_mscale": 1.1, "long_mscale": 1.4},
                        "num_local_experts": 2, "max_position_embeddings": 96}),
    "neox-dynamic": (GPTNeoXConfig, GPTNeoXForCausalLM, {"rope_parameters": {
                     "rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4,
                     "partial_rotary_factor": 0.5}}),
    "gemma3-by-layer": (Gemma3TextConfig, Gemma3ForCausalLM, {"rope_parameters": BY_LAYER,
                        "head_dim": 16, "sliding_window": 8,
                        "layer_types": ["sliding_attention", "full_attention"]}),
}  # fmt: skip
# On both sides of 24, equal ones, and near enough to each other to share a batch.
LENGTHS = (60, 22, 24, 25, 26, 26, 24, 31, 30, 48, 50, 9)


def build(name):
    if name in OTHERS:
        config, model, more = OTHERS[name]
    else:
        rope = {"rope_type": name, "rope_theta": 10000.0, **ROPES[name]}
        config, model, more = LlamaConfig, LlamaForCausalLM, {"rope_parameters": rope}
    torch.manual_seed(0)
    return model(config(**{**SHAPE, **more})).float().eval()


def as_row(texts):
    """A packed row that scores every token but the first of each text."""
    starts = [0, *itertools.accumulate(map(len, texts))]
    scored = [torch.arange(s, s + len(t) - 1) for s, t in zip(starts, texts, strict=False)]
    return {
        "tokens": torch.cat(texts)[None],
        "segment_lengths": [len(text) for text in texts],
        "scored_rows": torch.cat(scored),
        "target_ids": torch.cat([text[1:] for text in texts]),
    }


def alone(model, text):
    """Log-probs of one text by a model that has seen no other."""
    with torch.no_grad():
        logits = copy.deepcopy(model)(text[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, text[1:, None])[:, 0]


@pytest.fixture
def backend():
    def make(model):
        return TransformersBackend(copy.deepcopy(model))

    return make


def test_every_rope_is_tried():
    assert ROPES.keys() == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("name", [*ROPES, *OTHERS])
def test_numbers_are_those_of_a_text_alone(backend, name):
    model = build(name)
    texts = [torch.randint(0, 64, (n,), generator=torch.manual_seed(n)) for n in LENGTHS]
    expected = [alone(model, text) for text in texts]
    found = backend(model)
    order, rng = list(range(len(texts))), random.Random(0)
    for size in (len(texts), 5, 1):
        rows = [as_row([texts[i] for i in part]) for part in itertools.batched(order, size)]
        torch.testing.assert_close(
            torch.cat(found(rows)), torch.cat([expected[i] for i in order]), atol=1e-4, rtol=0
        )
        rng.shuffle(order)


@pytest.mark.parametrize("name", ["dynamic", "phi3-longrope", "gemma3-by-layer"])
def test_the_lengths_matter_here(name):
    """Without the rule the same texts have other numbers, so that the test above can fail."""
    model = build(name)
    texts = [torch.randint(0, 64, (n,), generator=torch.manual_seed(n)) for n in (22, 26)]
    with torch.no_grad():
        together = model(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)).logits[0, :21]
    logprobs = together.log_softmax(-1).gather(1, texts[0][1:, None])[:, 0]
    assert (logprobs - alone(model, texts[0])).abs().max() > 1e-2


def test_a_rope_of_fixed_frequencies_splits_no_batch(backend, monkeypatch):
    """Nothing is slower for most models: as many forward passes as without a rule."""
    row = as_row([torch.zeros(n, dtype=torch.int64) for n in LENGTHS])
    for name, expected in {"default": 4, "yarn": 4, "longrope": 4, "dynamic": 9}.items():
        found = backend(build(name))
        forward = mock.Mock(
            side_effect=lambda batch, targets, top: (
                targets[:, None].float(),
                targets[:, None][:, :0],
            )
        )
        monkeypatch.setattr(found, "_score_batch", forward)
        found([row])
        assert forward.call_count == expected, name
        assert found.rule.by_length == (name in ("longrope", "dynamic"))


def test_batches_of_prompts():
    """Texts that grow across the switch are only like those of their own length."""
    rule = BatchRule(build("phi3-longrope"))
    lengths = [10, 30, 20, 30, 20, 31]
    assert rule.batches(lengths, 2) == [[0, 2], [4], [1, 3], [5]]
    assert rule.batches(lengths, 8, grow=8) == [[0], [1, 3, 5], [2, 4]]
    assert BatchRule(build("dynamic")).batches(lengths, 8, grow=8) == [[0], [1, 3], [2, 4], [5]]
    assert BatchRule(build("llama3")).batches(lengths, 4, grow=8) == [[0, 1, 2, 3], [4, 5]]


def test_padding_that_a_model_sees():
    """A recurrent model has read what stands before a prompt, whatever the mask says."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    config = RwkvConfig(**shape, attention_hidden_size=32, intermediate_size=48)
    recurrent = RwkvForCausalLM(config)
    for parameter in recurrent.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    assert BatchRule(recurrent, writes=True).batches([5, 6, 5], 8) == [[0, 2], [1]]
    assert BatchRule(build("default"), writes=True).batches([5, 6, 5], 8) == [[0, 1, 2]]


def test_a_model_with_code_of_its_own_is_trusted_with_equal_lengths_only():
    own = type("Own", (LlamaForCausalLM,), {"__module__": "transformers_modules.own"})
    model = own(LlamaConfig(**SHAPE))
    rule = BatchRule(model)
    assert rule.batches([5, 6, 5, 6], 8) == [[0, 2], [1, 3]]
    rope = model.model.rotary_emb
    before = rope.inv_freq.clone()
    rope.inv_freq.mul_(2)
    rope.max_seq_len_cached = 99
    rule.reset()
    assert torch.equal(rope.inv_freq, before) and rope.max_seq_len_cached == 24


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_generation_equals_that_of_a_prompt_alone(name):
    """In batches that the rule allows, after other texts."""
    model = build(name)
    fresh, rule = copy.deepcopy(model), BatchRule(model)
    prompts = [torch.randint(0, 64, (n,), generator=torch.manual_seed(n)) for n in (40, 20, 10, 20)]
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for batch in rule.batches([len(p) for p in prompts], 8, grow=8):
        rule.reset()
        found = model.generate(torch.stack([prompts[i] for i in batch]), **how)
        for i, row in zip(batch, found, strict=True):
            expected = copy.deepcopy(fresh).generate(prompts[i][None], **how)[0]
            assert torch.equal(row, expected), i
