"""Import and export: exact to the bit, complete, and laid out as Megatron's TE spec asks."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.summary import describe
from support import tiny
from support.launcher import ROOT
from support.tiny import assert_same_weights, load_weights
from support.tools import run_tool

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> family in tiny.FAMILIES, what differs
MODELS: dict[str, Any] = {
    **{name: (name, {}) for name in tiny.FAMILIES},
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama-mha-head-dim": ("llama", {"num_key_value_heads": 8, "head_dim": 24}),
}


def checkpoint_keys(folder: Path) -> dict[str, list]:
    """Keys of a torch_dist folder as the golden file writes them: kind and global shape."""
    keys = {}
    for key, value in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
        if isinstance(value, TensorStorageMetadata):
            keys[key] = ["ShardedTensor", list(value.size)]
        else:
            name, shard = key.split("/shard_")
            keys[name] = ["ShardedObject", [int(shard.split("_")[1])]]
    return keys


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(tmp_path, name, dtype):
    family, extra = MODELS[name]
    hf = tiny.save_model(tmp_path / "hf", family, vocab_size=301, **extra)
    if dtype == "bf16":
        hf = recast(hf, tmp_path / "bf16", torch.bfloat16)
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")
    for path in hf.glob("*.json*"):
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    prints = [weights_fingerprint(p) for p in (hf, tmp_path / "megatron", tmp_path / "back")]
    assert prints[0] == prints[1] == prints[2]


def recast(hf: Path, folder: Path, dtype: torch.dtype) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(hf, dtype=dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(hf).save_pretrained(folder)
    return folder


def test_smollm2_round_trip_is_exact(tmp_path, smollm2):
    import_checkpoint(smollm2, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", shard_bytes=100_000_000)
    assert_same_weights(smollm2, tmp_path / "back")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.dtype == torch.float32 and model.num_parameters() == 134_515_008
    assert describe(tmp_path / "megatron")["parameters"] == "134,515,008"
    assert describe(tmp_path / "megatron")["legal TP"] == "1, 3"


def test_transformers_reads_a_sharded_export(tmp_path, tiny_hf):
    import_checkpoint(tiny_hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", shard_bytes=100_000)
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in load_weights(tmp_path / "back").values()
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(d) for d in (tiny_hf, tmp_path / "back")]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == tiny.TEMPLATE
    # And what was exported in shards can be imported again.
    import_checkpoint(tmp_path / "back", tmp_path / "again")
    assert weights_fingerprint(tmp_path / "again") == weights_fingerprint(tiny_hf)


@pytest.mark.parametrize("family", ["llama", "phi3", "mistral", "qwen2", "qwen3"])
def test_keys_are_those_of_the_te_spec(tmp_path, shared_data, family):
    golden = json.loads((shared_data.parent / "golden" / "te_spec_keys.json").read_text())
    variants = golden["variants"]
    expected = variants[family if family in variants else "llama_phi3_mistral"]
    # The factory of SwiGLU's two halves has no shape; on disk they are one tensor.
    expected["decoder.layers.mlp.linear_fc1.weight"] = ["ShardedTensor", [2, 256, 64]]
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    if family in ("mistral", "qwen3"):
        heads["head_dim"] = 16
    hf = tiny.save_model(tmp_path / "hf", family, **shape, **heads)
    import_checkpoint(hf, tmp_path / "megatron")
    keys = checkpoint_keys(tmp_path / "megatron" / "release")
    assert keys.pop("common_state") == ["ShardedObject", [1]]
    assert keys == expected


def test_ranks_share_the_work(ranks, tmp_path, tiny_hf):
    """Whatever their number, the same checkpoint and the same files come out."""
    import_checkpoint(tiny_hf, tmp_path / "one")
    expected = checkpoint_keys(tmp_path / "one" / "release")
    for world in (2, 3):
        megatron, back = tmp_path / f"megatron{world}", tmp_path / f"back{world}"
        target = "support.conversion:convert"
        ranks(world, target, "import_checkpoint", str(tiny_hf), str(megatron), {})
        assert checkpoint_keys(megatron / "release") == expected
        assert len(list((megatron / "release").glob("*.distcp"))) == world, "each rank wrote a part"
        assert weights_fingerprint(megatron) == weights_fingerprint(tiny_hf)
        options = {"shard_bytes": 100_000}
        ranks(world, target, "export_checkpoint", str(megatron), str(back), options)
        assert_same_weights(tiny_hf, back)
        assert not list(tmp_path.glob(".*partial"))


def test_tied_embeddings_have_no_output_layer(tmp_path):
    hf = tiny.save_model(tmp_path / "hf", "llama-tied")
    import_checkpoint(hf, tmp_path / "megatron")
    assert "output_layer.weight" not in checkpoint_keys(tmp_path / "megatron" / "release")


def test_dtype_of_megatron_weights_and_of_the_export(tmp_path, tiny_hf):
    import_checkpoint(tiny_hf, tmp_path / "megatron", torch.bfloat16)
    assert describe(tmp_path / "megatron")["dtype"] == "bfloat16"
    export_checkpoint(tmp_path / "megatron", tmp_path / "original")
    export_checkpoint(tmp_path / "megatron", tmp_path / "bf16", torch.bfloat16)
    source = load_weights(tiny_hf)
    for name, tensor in load_weights(tmp_path / "original").items():
        assert torch.equal(tensor, source[name].bfloat16().float()), name
    for name, tensor in load_weights(tmp_path / "bf16").items():
        assert torch.equal(tensor, source[name].bfloat16()), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "original" / "config.json").read_text())["dtype"] == "float32"


def test_a_config_that_declares_another_dtype_is_corrected(tmp_path, tiny_hf):
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "model.safetensors").symlink_to(tiny_hf / "model.safetensors")
    config = json.loads((tiny_hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "float32"


def test_mixed_dtypes_become_the_one_that_is_asked_for(tmp_path, tiny_hf):
    """As shards that were saved apart, or norms in float32."""
    from safetensors.torch import save_file

    mixed = {k: t if "norm" in k else t.bfloat16() for k, t in load_weights(tiny_hf).items()}
    hf = tmp_path / "hf"
    hf.mkdir()
    names = [sorted(mixed)[::2], sorted(mixed)[1::2]]
    files = [f"model-{i}-of-2.safetensors" for i in (1, 2)]
    for file, keys in zip(files, names, strict=True):
        save_file({k: mixed[k] for k in keys}, hf / file)
    index = {k: file for file, keys in zip(files, names, strict=True) for k in keys}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (hf / "config.json").write_text((tiny_hf / "config.json").read_text())
    assert describe(hf)["dtype"] == "bfloat16, float32"
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        import_checkpoint(hf, tmp_path / name, dtype)
        export_checkpoint(tmp_path / name, tmp_path / f"{name}-hf")
        for key, tensor in load_weights(tmp_path / f"{name}-hf").items():
            assert tensor.dtype == dtype and torch.equal(tensor, mixed[key].to(dtype)), key


def test_code_beside_the_weights_is_not_named_in_the_export(tmp_path, tiny_hf):
    """Its files are not carried, and transformers would look for them."""
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = Path(shutil.copytree(tiny_hf, tmp_path / "hf"))
    named = {"config.json": "AutoModelForCausalLM", "tokenizer_config.json": "AutoTokenizer"}
    for file, auto in named.items():
        content = json.loads((hf / file).read_text()) | {"auto_map": {auto: "modeling_x.Model"}}
        (hf / file).write_text(json.dumps(content))
    import_checkpoint(hf, tmp_path / "megatron")
    # As an import before this was written.
    shutil.copy(hf / "config.json", tmp_path / "megatron" / "hf" / "config.json")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert "auto_map" not in json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        auto.from_pretrained(tmp_path / "back", trust_remote_code=True)


def test_fingerprint_sees_any_weight(tmp_path, tiny_hf):
    from safetensors.torch import save_file

    weights = load_weights(tiny_hf)
    name = "model.layers.3.self_attn.v_proj.bias"
    weights[name] = weights[name].clone()
    weights[name][-1] = torch.nextafter(weights[name][-1], torch.tensor(9.0))
    (tmp_path / "config.json").write_text((tiny_hf / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) != weights_fingerprint(tiny_hf)


def test_command_line(tmp_path, tiny_hf, capsys):
    def convert(*words: object) -> str:
        assert run_tool("convert_checkpoint", list(map(str, words))) is None
        return capsys.readouterr().out

    megatron, back = tmp_path / "megatron", tmp_path / "back"
    convert("import", "--hf", tiny_hf, "--save", megatron, "--dtype", "fp32")
    inspected = convert("inspect", "--load", megatron)
    assert "qwen2" in inspected and "release" in inspected and "1, 2, 4" in inspected
    convert("export", "--load", megatron, "--save", back)
    assert_same_weights(tiny_hf, back)
    refused = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py")]
        + ["export", "--load", str(megatron), "--save", str(back)],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ") and "not empty" in refused.stderr
