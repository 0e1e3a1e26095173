"""All of a model's weights are loaded, or a sentence says which are not; never random numbers."""

import json
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.engine.hf_model import check_whole, load_causal_lm, load_classifier
from megatron_infifpo.errors import UserError
from support import tiny

LAYER = "model.layers.3.self_attn"
SHAPE = {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = LlamaConfig(**SHAPE, hidden_size=32, vocab_size=64, tie_word_embeddings=False)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole") / "hf"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def edited(whole, tmp_path):
    """Make a folder with other weights (None: without them) and another configuration."""

    def make(weights=None, rename=None, **config):
        folder = tmp_path / "edited"
        shutil.copytree(whole, folder, dirs_exist_ok=True)
        found = tiny.load_weights(whole) | (weights or {})
        found = {name: value for name, value in found.items() if value is not None}
        save_file({(rename or str)(k): v for k, v in found.items()}, folder / "model.safetensors")
        old = json.loads((whole / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
        return folder

    return make


def load(folder, **options):
    return load_causal_lm(folder, dtype=torch.float32, device_map={"": "cpu"}, **options)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


REFUSED: dict[str, Any] = {
    "no head": ({HEAD: None}, {}, f"tensor {HEAD} is missing"),
    "no projection": ({f"{LAYER}.q_proj.weight": None}, {}, "q_proj.weight is missing"),
    "another name": ({HEAD: None, "head.weight": torch.ones(64, 32)}, {},
                     "lm_head.weight is missing.* head.weight has no place .*renamed"),
    "more layers": ({}, {"num_hidden_layers": 5}, r"layers.4.* \(and 8 more\) is missing"),
    "fewer layers": ({}, {"num_hidden_layers": 3}, r"layers.3.* \(and 8 more\) is unknown"),
    "a bias": ({f"{LAYER}.q_proj.bias": torch.ones(32)}, {}, "q_proj.bias is unknown"),
    "a norm": ({f"{LAYER}.q_norm.weight": torch.ones(8)}, {}, "q_norm.weight is unknown"),
    "an adapter": ({f"{LAYER}.q_proj.lora_A.weight": torch.ones(2, 32)}, {}, "lora_A.* is unknown"),
    "a shape": ({HEAD: torch.ones(60, 32)}, {}, r"has shape \[60, 32\].* asks for \[64, 32\]"),
    "tied to none": ({HEAD: None, EMBEDDING: None}, {"tie_word_embeddings": True}, "is missing"),
    "tied to another": ({}, {"tie_word_embeddings": True}, "ties lm_head.* but their weights diff"),
    "unquantized": ({f"{LAYER}.q_proj.weight_scale_inv": torch.ones(1)}, {}, "scale_inv is unkno"),
    "no such size": ({}, {"hidden_size": "x"}, "cannot load .*expected int, got str"),
    "no such split": ({}, {"num_attention_heads": 5}, "cannot load .*not a multiple"),
    "no such function": ({}, {"hidden_act": "nope"}, "cannot load .*KeyError: 'nope'"),
    "no such model": ({}, {"model_type": "nope"}, "'nope', which transformers .* does not have"),
    "no causal model": ({}, {"model_type": "t5"}, "expected a causal language model"),
    "its own code": ({}, {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}},
                     "pass --trust-remote-code if you trust it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_a_sentence(edited, name, capfd):
    weights, config, sentence = REFUSED[name]
    folder = edited(weights, **config)
    with pytest.raises(UserError, match=sentence) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value) and str(folder) in str(refusal.value)
    assert "LOAD REPORT" not in capfd.readouterr().err


def test_layers_without_the_models_prefix(edited):
    """transformers takes them so, and what is left over is found as well."""
    folder = edited(rename=lambda name: name.removeprefix("model."))
    assert torch.equal(logits(load(folder)), logits(load(edited())))
    folder = edited(rename=lambda name: name.removeprefix("model."), num_hidden_layers=2)
    with pytest.raises(UserError, match="layers.2.input_layernorm.weight .* is unknown"):
        load(folder)


def test_what_is_not_needed(edited, whole, capsys):
    """Parts of other uses are named, once; buffers of old files and tied copies are not."""
    expected = logits(AutoModelForCausalLM.from_pretrained(whole))
    head = {"v_head.summary.weight": torch.ones(1, 32), "model.visual.layers.0.w": torch.ones(1)}
    assert torch.equal(logits(load(edited(head))), expected)
    assert "not used: model.visual.layers.0.w (and 1 more)" in capsys.readouterr().out
    old = {f"{LAYER}.rotary_emb.inv_freq": torch.ones(4)}
    assert torch.equal(logits(load(edited(old))), expected)
    ahead = {"model.layers.4.enorm.weight": torch.ones(32)}
    assert torch.equal(logits(load(edited(ahead, num_nextn_predict_layers=1))), expected)
    capsys.readouterr()
    embedding = tiny.load_weights(whole)[EMBEDDING]
    tied = [
        logits(load(edited(weights, tie_word_embeddings=True)))
        for weights in ({HEAD: None}, {HEAD: embedding}, {HEAD: embedding, EMBEDDING: None})
    ]
    assert torch.equal(tied[0], tied[1]) and torch.equal(tied[0], tied[2])
    assert not capsys.readouterr().out


def test_a_check_without_loading(edited, whole):
    check_whole(whole)
    with pytest.raises(UserError, match=f"tensor {HEAD} is missing"):
        check_whole(edited({HEAD: None}))


def test_the_head_of_a_classifier(edited):
    score = {HEAD: None, "score.weight": torch.ones(1, 32)}
    assert load_classifier(edited(score, num_labels=1), dtype=torch.float32).num_labels == 1
    other = {HEAD: None, "rm_head.weight": torch.ones(1, 32)}
    with pytest.raises(UserError, match="score.weight is missing.* rm_head.weight has no place"):
        load_classifier(edited(other, num_labels=1), dtype=torch.float32)
    with pytest.raises(UserError, match=r"score.weight has shape \[1, 32\]"):
        load_classifier(edited(score), dtype=torch.float32)


def test_folders_that_are_no_model(edited, tmp_path):
    cases = {"is not a folder": tmp_path / "none", "neither config.json": tmp_path}
    for sentence, folder in cases.items():
        with pytest.raises(UserError, match=sentence):
            load(folder)
    folder = edited()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "gone.safetensors"}}'
    )
    with pytest.raises(UserError, match="cannot read .*gone.safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON"):
        load(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into its base model first"):
        load(folder)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "torchao", "hqq", "compressed-tensors", "nope", None]
)
def test_quantized_without_its_package(edited, method):
    """Names the method; the fingerprint needs no package."""
    more = {"load_in_4bit": True} if method == "bitsandbytes" else {"bits": 4}
    folder = edited(quantization_config={"quant_method": method, **more})
    known = method in AUTO_QUANTIZER_MAPPING or method == "bitsandbytes"
    expected = (
        f"is quantized with {method}, .*" if known else f"not know the quantization {method!r}"
    )
    with pytest.raises(UserError, match=expected):
        load(folder)
    assert weights_fingerprint(folder) != weights_fingerprint(edited())


@pytest.fixture
def quantized(edited, whole):
    """A model in fp8 with a scale for each block of 16, and the weights that it means."""
    stored: dict[str, torch.Tensor] = {}
    meant = tiny.load_weights(whole)
    for name in [name for name in meant if "proj" in name]:
        blocks = meant[name].unflatten(1, (-1, 16)).unflatten(0, (-1, 16))
        scale = blocks.abs().amax((1, 3)) / 448
        small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (small.float() * scale[:, None, :, None]).reshape(meant[name].shape)
        stored |= {name: small.reshape(meant[name].shape), f"{name}_scale_inv": scale}
    how = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
    return stored, meant, {"quantization_config": how}


def test_quantized_weights_mean_what_they_say(edited, whole, quantized):
    stored, meant, config = quantized
    expected = LlamaForCausalLM.from_pretrained(whole)
    expected.load_state_dict(meant)
    torch.testing.assert_close(logits(load(edited(stored, **config))), logits(expected))


def test_quantized_weights_without_their_scale(edited, quantized):
    stored, _, config = quantized
    prints = {weights_fingerprint(edited(stored, **config))}
    lost = {f"{LAYER}.q_proj.weight_scale_inv": None}
    with pytest.raises(UserError, match="the scale of model.layers.3.self_attn.q_proj.weight"):
        load(edited(stored | lost, **config))
    half = {name: value / 2 for name, value in stored.items() if name.endswith("scale_inv")}
    prints.add(weights_fingerprint(edited(stored | half, **config)))
    small = stored[f"{LAYER}.q_proj.weight"].clone()
    small.view(torch.uint8)[0, 0] ^= 1
    prints.add(weights_fingerprint(edited(stored | {f"{LAYER}.q_proj.weight": small}, **config)))
    assert len(prints) == 3


def test_a_fingerprint_covers_what_is_computed(edited):
    """And not what is said about training and generation, nor how a file says it."""
    same: list[dict[str, Any]] = [
        {}, {"temperature": 0.7}, {"attention_dropout": 0.1}, {"eos_token_id": [1, 2]},
        {"rope_parameters": None, "rope_theta": 10000.0}, {"dtype": "bfloat16"},
    ]  # fmt: skip
    other: list[dict[str, Any]] = [
        {"rms_norm_eps": 1e-5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"num_key_value_heads": 2}, {"num_attention_heads": 8}, {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"model_type": "olmo2"},
        {"model_type": "olmo2", "rms_norm_eps": 1e-5}, {"quantization_config": {"bits": 4}},
    ]  # fmt: skip
    first = weights_fingerprint(edited())
    assert {weights_fingerprint(edited(**config)) for config in same} == {first}
    prints = [weights_fingerprint(edited(**config)) for config in other]
    assert len({first, *prints}) == 1 + len(other)


def test_a_fingerprint_covers_a_models_own_code(edited):
    folder = edited(model_type="own", auto_map={"AutoConfig": "a.B"})
    (folder / "a.py").write_text("class B: pass")
    first = weights_fingerprint(folder)
    (folder / "a.py").write_text("class B: x = 1")
    assert weights_fingerprint(folder) != first
