"""Mixtures of experts in conversion: names in checkpoints, what is said, what is refused."""

import json

import pytest
from safetensors.torch import save_file

from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.convert.summary import describe
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import (
    PUBLISHED,
    check_expert_parallel,
    check_tensor_parallel,
    megatron_args,
    tensor_parallel_sizes,
    weight_mapping,
)
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint
from support import experts, tiny
from support.tiny import load_weights

QWEN = PUBLISHED["qwen3-30b-a3b"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A tiny model of dense and sparse layers, and what was imported of it."""
    folder = tmp_path_factory.mktemp("mixed")
    hf = tiny.save_model(folder / "hf", "qwen3_moe-mixed", vocab_size=256, seed=8)
    import_checkpoint(hf, folder / "megatron")
    return hf, folder / "megatron"


def test_names_in_checkpoints(mixed):
    """Those that Megatron has for Transformer Engine's layers: `tests/gpu/test_te_layers.py`."""
    checkpoint = TorchDistCheckpoint(mixed[1] / "release")
    found = {key: list(checkpoint.shape(key)) for key in checkpoint.names()}
    states = open_checkpoint(mixed[1])[1].extra_state_keys
    found |= {key: [shards] for key, shards in states.items()}
    assert found == experts.golden_keys()
    assert all(checkpoint.has_object(key) for key in states)


def test_described(mixed):
    for folder in mixed:
        said = describe(folder)
        assert said["experts"] == "8 of 40 in 1 layers, 2 a token"
        assert said["legal EP"] == "1, 2, 4, 8"
        assert "--moe-layer-freq [0,0,0,1] --moe-router-pre-softmax" in said["flags"]


def test_an_expert_that_is_missing(mixed, tmp_path):
    weights = load_weights(mixed[0])
    del weights["model.layers.3.mlp.experts.5.up_proj.weight"]
    (tmp_path / "config.json").write_text((mixed[0] / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor model.layers.3.mlp.experts.5.up_proj.weight is m"):
        import_checkpoint(tmp_path, tmp_path / "megatron")


def test_a_checkpoint_of_other_layers(mixed, tmp_path):
    """A configuration that puts experts elsewhere does not fit."""
    carried = mixed[1] / "hf" / "config.json"
    before = carried.read_text()
    carried.write_text(json.dumps(json.loads(before) | {"mlp_only_layers": []}))
    try:
        with pytest.raises(UserError, match=r"decoder.layers.1.mlp.experts.* is missing"):
            export_checkpoint(mixed[1], tmp_path / "back")
    finally:
        carried.write_text(before)


def test_published_model():
    """30.5 billion parameters, of which a token meets 3.3."""
    args, mapping = megatron_args(QWEN), weight_mapping(QWEN)
    assert mapping.parameters == 30_532_122_624
    assert tensor_parallel_sizes(args) == [1, 2, 4]
    idle = 48 * (128 - 8) * 3 * 768 * 2048
    assert round((mapping.parameters - idle) / 1e9, 1) == 3.4
    for size in (1, 2, 8, 64, 128):
        check_expert_parallel(args, size)
    with pytest.raises(UserError, match="is 6, expected one of 1, 2, 4, .* the model's 128 exper"):
        check_expert_parallel(args, 6)
    with pytest.raises(UserError, match="tensor-parallel-size is 5, expected .* 768 units of an"):
        check_expert_parallel(args, 1, 5)
    with pytest.raises(UserError, match=r"divide the model's 32 attention heads and 4 key-value h"):
        check_tensor_parallel(args, 8)
    with pytest.raises(UserError, match="is 2, but the model has no experts"):
        check_expert_parallel(megatron_args(PUBLISHED["phi-4"]), 2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts_per_tok": 1}, "normalised weights, which are then 1"),
        ({"num_experts_per_tok": 129}, "a token goes to 129 experts of 128"),
        ({"mlp_only_layers": list(range(48))}, "leave no layer with experts"),
        ({"attention_bias": True}, "biased projections are not supported"),
        ({"num_experts": "many"}, "num_experts is 'many', expected a positive integer"),
    ],
)
def test_configurations_that_are_refused(change, sentence):
    with pytest.raises(UserError, match=sentence):
        megatron_args({**QWEN, **change})


def test_noise_in_a_router_is_refused():
    with pytest.raises(UserError, match="router_jitter_noise is 0.1, .* would depend on chance"):
        megatron_args({**PUBLISHED["mixtral-8x7b"], "router_jitter_noise": 0.1})
    with pytest.raises(UserError, match="use_sliding_window is True"):
        megatron_args({**tiny.SHAPE, **tiny.FAMILIES["qwen2_moe"], "use_sliding_window": True})
