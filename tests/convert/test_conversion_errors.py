"""What a user may give wrongly: one sentence that names it, and nothing half-written."""

import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.checkpoints import TRACKER, find_checkpoint
from support import tiny
from support.tiny import load_weights


@pytest.fixture
def hf(tmp_path, tiny_hf) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_hf, tmp_path / "hf"))


@pytest.fixture
def megatron(tmp_path, tiny_hf) -> Path:
    import_checkpoint(tiny_hf, tmp_path / "megatron")
    return tmp_path / "megatron"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    weights = load_weights(folder) | changes
    save_file({k: v for k, v in weights.items() if v is not None}, folder / "model.safetensors")


def refused(hf: Path, match: str) -> None:
    save = hf.parent / "not-to-be"
    with pytest.raises(UserError, match=match):
        import_checkpoint(hf, save)
    assert not list(hf.parent.glob("*not-to-be*")), "nothing may be left"


NAME = "model.layers.2.mlp.up_proj.weight"


def test_missing_tensor(hf):
    edit_weights(hf, **{NAME: None})
    refused(hf, f"{NAME} is missing")


def test_surplus_tensor(hf):
    edit_weights(hf, **{"model.layers.9.mlp.up_proj.weight": torch.zeros(2)})
    refused(hf, r"model\.layers\.9\.mlp\.up_proj\.weight is unknown")


def test_wrong_shape(hf):
    edit_weights(hf, **{NAME: torch.zeros(96, 63)})
    refused(hf, rf"{NAME} has shape \[96, 63\], but config.json asks for \[96, 64\]")


def test_mixed_and_unknown_dtypes(hf):
    edit_weights(hf, **{NAME: torch.zeros(96, 64, dtype=torch.bfloat16)})
    refused(hf, f"mixed dtypes .*{NAME} torch.bfloat16.*: say with --dtype")
    edit_weights(hf, **{NAME: torch.zeros(96, 64, dtype=torch.int8)})
    refused(hf, f"{NAME} is I8, expected one of F32, BF16, F16")


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("adapter_config.json", r"holds an adapter \(adapter_config.json\).*merge it"),
        ("adapter_model.safetensors", "holds an adapter"),
        ("adapters.safetensors", "holds an adapter"),
        ("pytorch_lora_weights.safetensors", "holds an adapter"),
        ("quantize_config.json", "there is a quantize_config.json: quantized weights"),
        ("model-00002-of-00002.safetensors", "holds model-00002.*would not be read beside model"),
        ("value_head.safetensors", "holds value_head.safetensors, which would not be read"),
    ],
)
def test_what_makes_another_model(hf, name, match):
    (hf / name).write_text("{}")
    refused(hf, match)
    if "quantize" not in name:  # transformers may read those
        with pytest.raises(UserError, match=match):
            weights_fingerprint(hf)


def test_two_models_in_a_folder(hf):
    index = hf / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    import_checkpoint(hf, hf.parent / "same")
    index.write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    refused(hf, "model.safetensors and an index of other files .model-00001-of-00001")


def test_copies_in_other_formats_are_named(hf, capsys):
    """Mistral's own format beside transformers', and pickled weights: common on the hub."""
    for name in ("consolidated.safetensors", "pytorch_model.bin", "training_args.bin"):
        (hf / name).write_text("x")
    import_checkpoint(hf, hf.parent / "megatron")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "not read" in x)
    assert line.endswith(": consolidated.safetensors, pytorch_model.bin")


def test_head_of_a_tied_model(tmp_path):
    """A copy of the embedding is what it is; anything else would be lost."""
    hf = tiny.save_model(tmp_path / "hf", "llama-tied")
    embedding = load_weights(hf)["model.embed_tokens.weight"]
    edit_weights(hf, **{"lm_head.weight": embedding.clone()})
    import_checkpoint(hf, tmp_path / "megatron")
    edit_weights(hf, **{"lm_head.weight": embedding + 1})
    refused(hf, "ties the output layer .* lm_head.weight differs")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model_type": "gpt2"},
            "model_type is 'gpt2', expected one of gemma3, gemma3_text, glm",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantized weights are not supported"),
        ({"quantization": {"bits": 4}}, "config.json has a quantization: quantized weights"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_act": None}, "hidden_act is None"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4}}, "rope_type is 'dynamic'"),
        (
            {"use_sliding_window": True, "layer_types": ["full_attention"] * 3},
            "layer_types has 3 entries for 4 layers",
        ),
        (
            {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4},
            "layer_types has 'chunked_attention'",
        ),
        ({"num_key_value_heads": 3}, "8 is not a multiple of num_key_value_heads 3"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4}}, "rope_type is 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ],
)
def test_unsupported_models(hf, changes, match):
    edit_config(hf, **changes)
    refused(hf, match)


def test_folders_that_are_no_checkpoint(tmp_path, hf):
    refused(tmp_path / "nowhere", "has neither config.json nor")
    (hf / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}  garbage")
    refused(hf, "cannot read .*model.safetensors")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    refused(hf, r"pickled weights \(\*\.bin\)")
    (hf / "pytorch_model.bin").unlink()
    refused(hf, "neither model.safetensors nor")
    for directory in (tmp_path / "nowhere", hf / "..", hf):
        with pytest.raises(UserError):
            weights_fingerprint(directory)
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    refused(hf, "cannot read .*gone.safetensors")


def test_save_folder_must_be_new(tmp_path, hf, megatron):
    with pytest.raises(UserError, match=f"{megatron} exists and is not empty"):
        import_checkpoint(hf, megatron)
    with pytest.raises(UserError, match=f"{hf} exists and is not empty"):
        export_checkpoint(megatron, hf)
    (tmp_path / "empty").mkdir()
    export_checkpoint(megatron, tmp_path / "empty")
    assert weights_fingerprint(tmp_path / "empty") == weights_fingerprint(hf)


@pytest.mark.parametrize("limit", [10_000, 200_000])
def test_full_disk_leaves_nothing(tmp_path, hf, megatron, limit):
    before = sorted(p.name for p in tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # writes fail as on a full disk
    try:
        with pytest.raises(UserError, match="cannot write --save .*nothing was left"):
            import_checkpoint(hf, tmp_path / "a")
        with pytest.raises(UserError, match="cannot write --save .*nothing was left"):
            export_checkpoint(megatron, tmp_path / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_interruption_leaves_nothing(tmp_path, hf, monkeypatch):
    before = sorted(p.name for p in tmp_path.iterdir())

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_infifpo.convert.hf_import.carry", interrupt)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(hf, tmp_path / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def exported(megatron: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match):
        export_checkpoint(megatron, megatron.parent / "not-to-be", **options)
    assert not list(megatron.parent.glob("*not-to-be*"))


def test_checkpoints_that_cannot_be_exported(tmp_path, megatron):
    exported(tmp_path, f"is not a Megatron checkpoint: it has no {TRACKER}")
    exported(megatron, "has no iter_0000007: its iterations are none", iteration=7)
    (megatron / "release").rename(megatron / "iter_0000007")
    exported(megatron, "has no release: its iterations are iter_0000007")
    assert find_checkpoint(megatron, 7).name == "iter_0000007"
    (megatron / TRACKER).write_text("7\n")
    assert find_checkpoint(megatron).name == "iter_0000007"
    (megatron / "iter_0000007" / "metadata.json").unlink()
    exported(megatron, "iter_0000007 has no metadata.json: it is incomplete")
    (megatron / TRACKER).write_text("newest")
    exported(megatron, "says 'newest'")


def test_exported_tensors_must_fit_the_config(megatron):
    edit_config(megatron / "hf", intermediate_size=97)
    exported(megatron, r"linear_fc1\.weight has shape \[4, 192, 64\], .* \[4, 194, 64\]")
    edit_config(megatron / "hf", intermediate_size=96, model_type="llama")
    exported(megatron, r"linear_qkv\.bias is unknown")
    edit_config(megatron / "hf", model_type="qwen2", tie_word_embeddings=True)
    exported(megatron, r"output_layer\.weight is unknown")
    edit_config(megatron / "hf", tie_word_embeddings=False, vocab_size=321)
    exported(megatron, r"has shape \[320, 64\], but config.json asks for \[321, 64\]")
    shutil.rmtree(megatron / "hf")
    exported(megatron, r"has no hf/config\.json")


def test_metadata_runs_no_code(megatron):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (megatron / "ran",))

    (megatron / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))
    exported(megatron, "cannot read .*metadata")
    assert not (megatron / "ran").exists()


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_broken_config(hf, content):
    (hf / "config.json").write_text(content)
    refused(hf, "config.json (is not JSON|holds list)")


def test_a_tensor_in_two_files(hf):
    shutil.copy(hf / "model.safetensors", hf / "a.safetensors")
    (hf / "model.safetensors").rename(hf / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(hf, "is in a.safetensors and in b.safetensors")


def test_broken_checkpoint_files(tmp_path, megatron):
    (part,) = (megatron / "release").glob("*.distcp")
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    exported(megatron, r"has \d+ bytes, expected \d+: the checkpoint is damaged")
    part.unlink()
    exported(megatron, "is missing: the checkpoint is damaged")
    with pytest.raises(UserError, match="is missing"):
        weights_fingerprint(megatron)


def test_a_layer_that_the_files_do_not_hold(megatron):
    """Never what happens to be in memory."""
    from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

    checkpoint = TorchDistCheckpoint(megatron / "release")
    with pytest.raises(UserError, match="does not hold all of"):
        checkpoint.read("decoder.layers.mlp.linear_fc2.weight", (4, 0, 0), (1, 64, 96))


def test_full_disk_of_one_of_two_ranks(tmp_path, hf, ranks):
    """Both say so; the launcher may end one before it has tidied up, but nothing looks complete."""
    from support.launcher import RankError

    target = "support.conversion:import_with_full_disk"
    with pytest.raises(RankError) as failure:
        ranks(2, target, str(hf), str(tmp_path / "a"))
    assert "cannot write --save" in "".join(failure.value.logs)
    assert {p.name for p in tmp_path.iterdir()} <= {"hf", ".a.partial"}
