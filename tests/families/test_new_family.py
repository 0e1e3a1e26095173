"""A family from outside: one object and its entry in `FAMILIES`, and it is converted."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES, llama, megatron_args, one_layer, weight_mapping
from megatron_infifpo.families.common import Family, dense_args
from megatron_infifpo.families.fields import refuse
from megatron_infifpo.families.mapping import Row
from megatron_infifpo.families.ropes import rope_args
from megatron_infifpo.families.transforms import Dims, Transform
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint


def toy_args(config: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a `toy` config.json: sizes under names of its own."""
    refuse(config, "parallel_blocks", unless=[None, False], reason="blocks follow each other")
    named = {**config, "num_hidden_layers": config["depth"], "hidden_size": config["width"]}
    extras = {"gain": [0.5 + layer for layer in range(config["depth"])], "cap": 3.0}
    return dense_args(named) | rope_args(named) | {"extras": extras}


def halves(dims: Dims) -> int:
    return dims.ffn


# Up before gate, in one tensor; Megatron has gate before up.
UP_GATE = Transform(
    lambda parts, dims: parts[0].roll(halves(dims), 0),
    lambda tensor, dims: [tensor.roll(halves(dims), 0)],
)
FUSED = Row(
    "decoder.layers.mlp.linear_fc1.weight",
    ("model.layers.{}.mlp.up_gate.weight",),
    ("gate_up", "hidden"),
    UP_GATE,
)
TOY = Family(
    toy_args,
    tuple(FUSED if row.key == FUSED.key else row for row in llama.ROWS),
    hf_name=lambda name: None if name.startswith("speech.") else name.removeprefix("text."),
)
CONFIG: dict[str, Any] = {
    "model_type": "toy",
    "depth": 3,
    "width": 16,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}


@pytest.fixture
def toy(tmp_path, monkeypatch) -> Path:
    """A folder of a toy model, in a program that knows the family."""
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    generator = torch.Generator().manual_seed(4)
    weights = {
        f"text.{name}": torch.randn(shape, generator=generator)
        for entry in weight_mapping(CONFIG).entries()
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights | {"speech.head": torch.ones(3)}, folder / "model.safetensors")
    return folder


def test_it_is_imported_and_exported(toy, tmp_path):
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    import_checkpoint(toy, megatron)
    export_checkpoint(megatron, back)
    before, after = (load_file(folder / "model.safetensors") for folder in (toy, back))
    assert after.keys() == {n.removeprefix("text.") for n in before if n.startswith("text.")}
    assert all(torch.equal(before[f"text.{name}"], tensor) for name, tensor in after.items())
    assert weights_fingerprint(toy) == weights_fingerprint(megatron) == weights_fingerprint(back)
    checkpoint = TorchDistCheckpoint(megatron / "release")
    fused = before["text.model.layers.1.mlp.up_gate.weight"]
    joined = checkpoint.read(FUSED.key, (1, 0, 0), (1, 24, 16)).squeeze(0)
    assert torch.equal(joined, torch.cat([fused[12:], fused[:12]]))


def test_what_it_cannot_be_is_refused(toy):
    with pytest.raises(UserError, match="parallel_blocks is True, expected False: blocks follow"):
        megatron_args(CONFIG | {"parallel_blocks": True})
    with pytest.raises(UserError, match="model_type is 'toys'.* llama, .*, toy: docs/adding"):
        megatron_args(CONFIG | {"model_type": "toys"})


def test_one_of_its_layers_is_a_model(toy):
    """Lists among what a family adds have one value a layer."""
    args = one_layer(megatron_args(CONFIG), 2)
    assert args["num_layers"] == 1 and args["extras"] == {"gain": [2.5], "cap": 3.0}


def test_sizes_follow_from_its_rows(toy):
    count = sum(math.prod(entry.shape) for entry in weight_mapping(CONFIG).entries())
    layer = 16 * (4 + 2 + 2) * 6 + 24 * 16 + 3 * 12 * 16 + 2 * 16
    assert count == 2 * 40 * 16 + 16 + 3 * layer
