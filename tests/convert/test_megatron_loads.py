"""Megatron itself loads what import writes, and computes what transformers computes."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.summary import describe
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from support import tiny
from support.tiny import assert_same_weights, load_weights

LAYOUTS = {
    "tp1": (1, {}),
    "tp2-pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    "pp2-vpp2-bf16": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2, "bf16": True}),
    "tp4": (4, {"tensor_parallel": 4}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of imported tiny models: (hf, megatron) by family."""
    folder = tmp_path_factory.mktemp("models")
    made = {}

    def get(family: str):
        if family not in made:
            hf = tiny.save_model(folder / family, family, vocab_size=301)
            import_checkpoint(hf, folder / f"{family}-megatron")
            made[family] = hf, folder / f"{family}-megatron"
        return made[family]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen2", "llama-tied"])
def test_memory_and_disk_agree(ranks, models, family, layout):
    """Megatron's own loading of the checkpoint fills every parameter as load_into_model does."""
    world, sizes = LAYOUTS[layout]
    hf, megatron = models(family)
    results = ranks(world, "support.conversion:load_both", str(hf), str(megatron), sizes)
    for result in results:
        assert result["differ"] == [] and result["names"]
        assert result["dtypes"] == {"torch.bfloat16" if sizes.get("bf16") else "torch.float32"}
    names = {name for result in results for name in result["names"]}
    tied_copy = family == "llama-tied" and "pipeline_parallel" in sizes
    assert any("output_layer.weight" in name for name in names) == (family == "qwen2" or tied_copy)


@pytest.mark.parametrize(
    "family", ["llama-tied", "phi3-partial", "qwen2-window", "qwen3", "mistral"]
)
def test_megatron_lm_reads_the_architecture(ranks, models, family):
    """`--use-checkpoint-args` and the flags that `inspect` prints make up all of it."""
    hf, megatron = models(family)
    flags = describe(megatron)["flags"].split()
    target = "support.conversion:megatrons_own_arguments"
    (found,) = ranks(1, target, str(megatron), flags)
    expected = megatron_args(read_hf_config(hf))
    # The tokenizer's, and what is ours.
    ours = ("family", "extras")
    for name in ("vocab_size", "make_vocab_size_divisible_by", "tokenizer_type", *ours):
        del expected[name]
    assert {name: found[name] for name in expected} == expected


def test_export_of_what_megatron_saved(ranks, models, tmp_path):
    """In shards, with a copy of the tied embedding, and a vocabulary padded from 301 to 512."""
    world, sizes = LAYOUTS["tp2-pp2"]
    hf, megatron = models("llama-tied")
    save = tmp_path / "run"
    target = "support.conversion:save_with_megatron"
    ranks(world, target, str(hf), str(save / "iter_0000005"), sizes)
    shutil.copytree(megatron / "hf", save / "hf")
    (save / "latest_checkpointed_iteration.txt").write_text("5")
    export_checkpoint(save, tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_verify(ranks, models, family):
    hf, megatron = models(family)
    flags = ["--hf", str(hf), "--load", str(megatron), "--tolerance", "1e-4"]
    assert ranks(1, "support.conversion:verify", flags) == [0]
    assert "equal within the tolerance of 0.0001" in ranks.logs[0]


def test_verify_at_a_parallel_layout(ranks, models):
    hf, megatron = models("phi3-partial")
    flags = ["--hf", str(hf), "--load", str(megatron), "--tensor-model-parallel-size", "2"]
    flags += ["--pipeline-model-parallel-size", "2", "--tolerance", "1e-4"]
    assert ranks(4, "support.conversion:verify", flags) == [0] * 4
    assert sum("equal within" in log for log in ranks.logs) == 1


BY_LAYERS = [("gemma3", 1), ("gemma3", 2), ("qwen2-window", 1), ("llama-tied", 2)]
BY_LAYERS += [("granite", 1), ("olmo3", 2), ("glm4", 1), ("phi3-longrope", 1), ("smollm3", 1)]


@pytest.mark.parametrize("family, tp", BY_LAYERS)
def test_verify_by_layers(ranks, models, family, tp):
    """One layer in memory: local and global layers, a window on some, tied heads, multipliers."""
    hf, megatron = models(family)
    flags = ["--hf", str(hf), "--load", str(megatron), "--by-layers", "--tolerance", "1e-4"]
    flags += ["--tensor-model-parallel-size", str(tp)]
    assert ranks(tp, "support.conversion:verify", flags) == [0] * tp
    assert "equal within the tolerance of 0.0001" in ranks.logs[0]
    assert "all weights are equal to the bit" in ranks.logs[0]


def test_verify_notices_one_wrong_weight(ranks, models, tmp_path):
    hf, megatron = models("llama")
    weights = load_weights(hf)
    name = "model.layers.1.self_attn.k_proj.weight"
    weights[name] = weights[name].roll(1, 0)
    for path in hf.glob("*.json*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    flags = ["--hf", str(tmp_path), "--load", str(megatron), "--tensor-model-parallel-size", "2"]
    assert ranks(2, "support.conversion:verify", flags) == [2, 2]
    assert "MISMATCH" in ranks.logs[0] + ranks.logs[1]
    assert f"the weights that differ most: {name}" in ranks.logs[0] + ranks.logs[1]
    assert ranks(1, "support.conversion:verify", [*flags[:4], "--by-layers"]) == [2]
    assert "hidden states part most in layer 1: from" in ranks.logs[0]


def test_verify_smollm2(ranks, smollm2, tmp_path):
    """Real weights, real text, three ranks of three heads each."""
    import_checkpoint(smollm2, tmp_path / "megatron")
    flags = ["--hf", str(smollm2), "--load", str(tmp_path / "megatron")]
    texts = tmp_path / "texts.txt"
    texts.write_text("The capital of France is Paris.\n\nprint('hello, world')\n")
    flags += ["--tensor-model-parallel-size", "3", "--texts", str(texts)]
    assert ranks(3, "support.conversion:verify", flags) == [0] * 3


def test_verify_refuses_another_model(ranks, models, tmp_path):
    """Of which half the layers may well be equal."""
    from support.launcher import RankError

    hf, _ = models("llama")
    _, megatron = models("llama-tied")
    for more in ([], ["--by-layers"]):
        with pytest.raises(RankError, match="untie_embeddings_and_output_weights is False"):
            flags = ["--hf", str(hf), "--load", str(megatron), *more]
            ranks(1, "support.conversion:verify", flags)


def test_worst_tensor_with_nan(models, tmp_path):
    from megatron_infifpo.checks.weights import worst_tensor

    hf, megatron = models("llama")
    weights = load_weights(hf)
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name] = weights[name].clone()
    weights[name][0, 0] = torch.nan
    (tmp_path / "config.json").write_text((hf / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    assert name in worst_tensor(tmp_path, megatron)
