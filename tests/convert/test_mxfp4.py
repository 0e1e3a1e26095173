"""gpt-oss as it is published: four bits a weight and a scale for every 32."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_folder import open_hf
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from support import tiny
from support.tiny import load_weights

EXPERTS = "model.layers.0.mlp.experts."


def pack(hf, folder):
    """A copy of a tiny model with random blocks and scales; return these and the other weights."""
    generator, packed = torch.Generator().manual_seed(3), {}
    for name, weight in load_weights(hf).items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            packed[name] = weight.bfloat16()
            continue
        experts, columns, rows = weight.shape
        shape = (experts, rows, columns // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    shutil.copytree(hf, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(packed, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return packed


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("mxfp4")
    hf = tiny.save_model(root / "hf", "gpt_oss", vocab_size=256, seed=9)
    return root / "packed", pack(hf, root / "packed")


def test_equals_transformers_bit_by_bit(published):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder, packed = published
    weights, _, _ = open_hf(folder)
    for part in ("gate_up_proj", "down_proj"):
        blocks, scales = (packed[f"{EXPERTS}{part}_{kind}"] for kind in ("blocks", "scales"))
        expected = convert_moe_packed_tensors(blocks, scales)
        assert torch.equal(weights.load(f"{EXPERTS}{part}"), expected)


def test_becomes_a_model_in_bfloat16(published, tmp_path):
    """What is exported is whole, says so, and is the model that was imported."""
    folder, _ = published
    import_checkpoint(folder, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    weights, _, _ = open_hf(folder)
    found = load_weights(tmp_path / "out")
    assert sorted(found) == weights.names()
    assert all(torch.equal(tensor, weights.load(name)) for name, tensor in found.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    folders = (folder, tmp_path / "megatron", tmp_path / "out")
    assert len({weights_fingerprint(place) for place in folders}) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w: w.pop(f"{EXPERTS}down_proj_scales"), "down_proj_blocks has no .*_scales"),
        (lambda w: w.pop(f"{EXPERTS}down_proj_blocks"), "down_proj_scales has no .*_blocks"),
        (
            lambda w: w.update({f"{EXPERTS}down_proj_scales": torch.zeros(8, 64, 3).byte()}),
            r"\[8, 64, 2, 16\] and .*_scales \[8, 64, 3\] are no MXFP4",
        ),
        (
            lambda w: w.update({f"{EXPERTS}down_proj_scales": torch.zeros(8, 64, 2)}),
            "are no MXFP4: expected bytes",
        ),
    ],
)
def test_broken(published, tmp_path, change, sentence):
    folder, packed = published
    shutil.copytree(folder, tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    weights = dict(packed)
    change(weights)
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        open_hf(tmp_path / "broken")


def test_of_other_families_it_is_refused():
    config = tiny.config("qwen3_moe", vocab_size=256).to_dict()
    with pytest.raises(UserError, match=r"quantization_config \(mxfp4\)"):
        megatron_args({**config, "quantization_config": {"quant_method": "mxfp4"}})
