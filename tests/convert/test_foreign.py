"""Checkpoints that Megatron-LM, Megatron-Bridge or NeMo trained, and one for Megatron-Bridge."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from megatron_infifpo.convert.bridge import write_run_config
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.summary import describe
from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint
from support import tiny
from support.tiny import assert_same_weights

CASES = [
    ("qwen2", "megatron-lm"),
    ("qwen2", "megatron-lm-by-layer"),
    ("qwen2", "nemo"),
    ("llama-tied", "bridge"),
    ("qwen3_moe", "megatron-lm"),
    ("qwen3_moe", "nemo"),
    ("qwen3_moe-mixed", "megatron-lm"),
]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A tiny model's Hugging Face folder, and a checkpoint of it by another program."""
    root = tmp_path_factory.mktemp("foreign")
    made: dict[tuple, tuple[Path, Path]] = {}

    def get(model: str, program: str, **arguments):
        key = (model, program, *arguments.items())
        if key not in made:
            hf = root / model
            if not hf.exists():
                tiny.save_model(hf, model, vocab_size=301)
            folder = root / f"{model}-{program}-{len(made)}"
            ranks(1, "support.foreign:save", str(hf), str(folder), program, arguments)
            made[key] = hf, folder
        return made[key]

    return get


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_exported(saved, tmp_path, case):
    hf, folder = saved(*case)
    export_checkpoint(folder, tmp_path / "out", hf=hf)
    assert_same_weights(hf, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "parameters" in describe(folder, hf=hf)


def test_names_that_differ_from_ours(saved):
    """Else nothing was proved: layers and experts in one tensor, layers apart, NeMo's prefix."""
    found = {}
    for case in CASES:
        path = saved(*case)[1] / ("weights" if case[1] == "nemo" else "iter_0000007")
        checkpoint = TorchDistCheckpoint(path)
        found[case] = {key: checkpoint.shape(key) for key in checkpoint.names()}
    experts = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    assert found["qwen3_moe", "megatron-lm"][experts][:2] == (4, 8)
    assert f"module.{experts}" in found["qwen3_moe", "nemo"]
    by_layer = found["qwen2", "megatron-lm-by-layer"]
    assert "decoder.layers.3.self_attention.linear_proj.weight" in by_layer


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[5]], ids="-".join)
@pytest.mark.parametrize("by_layers", [False, True], ids=["whole", "by-layers"])
def test_verified(ranks, saved, case, by_layers):
    """Also a checkpoint that was given its config.json: Megatron would not find its tensors."""
    hf, folder = saved(*case)
    job = {"hf": str(hf), "load": str(folder), "by_layers": by_layers}
    (result,) = ranks(1, "support.foreign:verified", job)
    assert result == [True, "all weights are equal to the bit"]
    if not by_layers and case[1] != "nemo":
        tiny_hf = folder / "hf"
        shutil.copytree(hf, tiny_hf, ignore=shutil.ignore_patterns("*.safetensors"))
        (result,) = ranks(1, "support.foreign:verified", job)
        shutil.rmtree(tiny_hf)
        assert result == [True, "all weights are equal to the bit"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("rotary_base", 500_000),
        ("layernorm_epsilon", 1e-3),
        ("num_query_groups", 1),
        ("layernorm_zero_centered_gamma", True),
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
    ],
)
def test_another_model_of_the_same_shapes(saved, tmp_path, argument, value):
    """No shape says it, and no log-prob would be right."""
    hf, folder = saved("qwen2", "megatron-lm", **{argument: value})
    with pytest.raises(UserError, match=f"was trained with {argument} {value}"):
        export_checkpoint(folder, tmp_path / "out", hf=hf)
    assert not (tmp_path / "out").exists()


def test_a_window_on_all_layers_but_some(saved, tmp_path):
    """Which Megatron-LM also takes as a number; and experts in one tensor, also on disk."""
    hf, folder = saved("gpt_oss", "megatron-lm", window_attn_skip_freq=2)
    export_checkpoint(folder, tmp_path / "out", hf=hf)
    hf, folder = saved("gpt_oss", "megatron-lm", window_attn_skip_freq=3)
    with pytest.raises(UserError, match=r"was trained with window_attn_skip_freq \[1, 1, 0, 1\]"):
        export_checkpoint(folder, tmp_path / "other", hf=hf)


@pytest.mark.parametrize("program", ["bridge", "nemo"])
def test_settings_beside_the_tensors(saved, tmp_path, program):
    hf, folder = saved("qwen2", program)
    if program == "bridge":
        path, content = folder / "iter_0000007" / "run_config.yaml", {"model": {"rotary_base": 7}}
    else:
        path, content = folder / "context" / "model.yaml", {"config": {"rotary_base": 7}}
        path.parent.mkdir()
    path.write_text(yaml.safe_dump(content))
    try:
        with pytest.raises(UserError, match="was trained with rotary_base 7"):
            describe(folder, hf=hf)
        path.write_text("model: [")
        with pytest.raises(UserError, match=f"cannot read {path}"):
            describe(folder, hf=hf)
    finally:
        path.unlink()


def test_refused(saved, tmp_path):
    hf, folder = saved("qwen2", "megatron-lm")
    with pytest.raises(UserError, match="say with --hf which Hugging Face model it is"):
        export_checkpoint(folder, tmp_path / "out")
    other = tiny.save_model(tmp_path / "other", "qwen3", vocab_size=301)
    with pytest.raises(UserError, match="tensor .*_layernorm.weight is missing: config.json asks"):
        export_checkpoint(folder, tmp_path / "out", hf=other)
    with pytest.raises(UserError, match="--iteration has no effect"):
        export_checkpoint(folder / "iter_0000007", tmp_path / "out", iteration=7, hf=hf)
    import_checkpoint(hf, tmp_path / "ours")
    with pytest.raises(UserError, match="--hf has no effect: .* carries a config.json of its own"):
        export_checkpoint(tmp_path / "ours", tmp_path / "out", hf=hf)


def test_common_state_runs_no_code(saved, tmp_path):
    """A stranger's checkpoint may hold any pickle."""
    hf, folder = saved("qwen2", "megatron-lm")
    copy = shutil.copytree(folder, tmp_path / "copy")
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            return (open, (str(witness), "w"))

    torch.save({"args": Evil()}, copy / "iter_0000007" / "common.pt")
    describe(copy, hf=hf)
    assert not witness.exists()


@pytest.mark.parametrize("model", ["llama", "qwen2-window", "qwen3_moe"])
def test_run_config(tmp_path, model):
    """Every field is one of Megatron's TransformerConfig, or of Megatron-Bridge's provider."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    hf = tiny.save_model(tmp_path / "hf", model, vocab_size=301)
    import_checkpoint(hf, tmp_path / "ours")
    path = write_run_config(tmp_path / "ours")
    assert path == tmp_path / "ours" / "release" / "run_config.yaml"
    content = yaml.safe_load(path.read_text())
    known = set(TransformerConfig.__dataclass_fields__) | PROVIDER
    assert set(content["model"]) - known == set()
    assert content["model"]["params_dtype"]["_target_"] == "torch.float32"
    assert "run_config.yaml" not in describe(tmp_path / "ours").values()  # read back, and agrees
    with pytest.raises(UserError, match="cannot write"):
        write_run_config(tmp_path / "ours")


# Of `GPTModelProvider` in Megatron-Bridge 0.3.1, beside what it inherits.
PROVIDER = {
    "_target_",
    "make_vocab_size_divisible_by",
    "position_embedding_type",
    "rope_scaling",
    "rope_scaling_factor",
    "rotary_base",
    "rotary_percent",
    "seq_length",
    "share_embeddings_and_output_weights",
    "vocab_size",
}


def test_run_config_of_other_layers(tmp_path):
    hf = tiny.save_model(tmp_path / "hf", "gemma3", vocab_size=301)
    import_checkpoint(hf, tmp_path / "ours")
    with pytest.raises(UserError, match="that Megatron's GPT model lacks"):
        write_run_config(tmp_path / "ours")
