"""The paper's models at their true sizes, without their weights; and random legal sizes of all."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.engine.hf_names import as_saved
from megatron_infifpo.families import (
    FAMILIES,
    PUBLISHED,
    megatron_args,
    tensor_parallel_sizes,
    weight_mapping,
)
from support import tiny
from support.tiny import assert_same_weights

SIZES = {
    "phi-4": (14_659_507_200, [1, 2, 5, 10]),
    "qwen2.5-14b": (14_770_033_664, [1, 2, 4, 8]),
    "qwen2.5-math-7b": (7_615_616_512, [1, 2, 4]),
    "mistral-small-24b": (23_572_403_200, [1, 2, 4, 8]),
    "gpt-oss-20b": (20_914_757_184, [1, 2, 4, 8]),
    "gpt-oss-120b": (116_829_156_672, [1, 2, 4, 8]),
    "gemma-3-12b": (11_766_034_176, [1, 2, 4, 8]),
    "glm-4-9b-chat": (9_399_951_360, [1, 2]),
    "glm-4-9b-0414": (9_400_279_040, [1, 2]),
    "granite-3.3-8b": (8_170_864_640, [1, 2, 4, 8]),
    "mistral-small-3.1-24b": (23_572_403_200, [1, 2, 4, 8]),
    "olmo-2-7b": (7_298_617_344, [1, 2, 4, 8, 16, 32]),
    "olmo-3-7b": (7_298_011_136, [1, 2, 4, 8, 16, 32]),
    "smollm3-3b": (3_075_098_624, [1, 2, 4]),
    "phi-4-mini": (3_836_021_760, [1, 2, 4, 8]),
    "mixtral-8x7b": (46_702_792_704, [1, 2, 4, 8]),
    "qwen3-30b-a3b": (30_532_122_624, [1, 2, 4]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_of_published_models(tmp_path, name):
    """The rows ask for just the tensors that transformers makes, here on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = PUBLISHED[name]
    mapping = weight_mapping(config)
    expected = {
        tensor: shape
        for entry in mapping.entries()
        for tensor, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    text = FAMILIES[config["model_type"]].text_config(config)
    (tmp_path / "config.json").write_text(json.dumps(text))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    saved = as_saved(model, model.state_dict())
    found = {tensor: tuple(value.shape) for tensor, value in saved.items()}
    if text.get("tie_word_embeddings"):
        del found["lm_head.weight"]
    assert found == expected
    count, tensor_parallel = SIZES[name]
    assert sum(math.prod(shape) for shape in expected.values()) == count
    assert tensor_parallel_sizes(megatron_args(config)) == tensor_parallel


def test_gemma_12b_layers():
    args = megatron_args(PUBLISHED["gemma-3-12b"])
    assert args["window_size"] == (1023, 0) and args["rotary_base"] == 1_000_000
    local = args["extras"]["local_layers"]
    assert len(local) == 48 and [i for i, is_local in enumerate(local) if not is_local] == [
        5, 11, 17, 23, 29, 35, 41, 47,
    ]  # fmt: skip
    assert args["window_attn_skip_freq"] == [int(layer) for layer in local]
    assert args["extras"]["global_rope_factor"] == 8.0
    assert args["extras"]["local_rotary_base"] == 10_000.0
    assert args["extras"]["softmax_scale"] == 1 / 16


@st.composite
def sizes(draw) -> dict:
    """Any legal sizes of a small model."""
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 6))
    own_head_dim = draw(st.booleans())
    hidden = heads * (head_dim if own_head_dim else draw(st.integers(1, 5)))
    return {
        "num_key_value_heads": groups, "num_attention_heads": heads, "head_dim": head_dim,
        "hidden_size": hidden, "intermediate_size": draw(st.integers(1, 20)),
        "num_hidden_layers": draw(st.integers(1, 4)), "vocab_size": draw(st.integers(4, 40)),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip


def weights_of(folder: Path, family: str, shape: dict, dtype: torch.dtype, seed: int) -> Path:
    """Random weights of a model, by the names and shapes that transformers gives them."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    special = tiny.FAMILIES[family]
    special = {k: v for k, v in special.items() if k not in shape and k != "layer_types"}
    if family == "phi3-longrope":  # a factor for each frequency of one size of heads
        special = {k: v for k, v in special.items() if k != "rope_parameters"}
    if family.startswith(("phi3", "qwen2")):  # their heads always fill the hidden size
        shape = shape | {"hidden_size": shape["head_dim"] * shape["num_attention_heads"]}
        shape = {k: v for k, v in shape.items() if k != "head_dim"}
    if "decoder_sparse_step" in special:  # of its tiny layers only the last has experts
        shape = shape | {"num_hidden_layers": tiny.SHAPE["num_hidden_layers"]}
    config = AutoConfig.for_model(**shape, **special, pad_token_id=None, max_position_embeddings=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in as_saved(model, model.state_dict()).items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }
    folder.mkdir()
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
@settings(
    deadline=None, max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shape=sizes(), half=st.booleans(), seed=st.integers(0, 99))
def test_random_sizes_round_trip(tmp_path_factory, family, shape, half, seed):
    """Import and export of any legal sizes give back every tensor to the bit."""
    tmp_path = tmp_path_factory.mktemp("sizes")
    dtype = torch.bfloat16 if half else torch.float32
    hf = weights_of(tmp_path / "hf", family, shape, dtype, seed)
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    assert_same_weights(hf, tmp_path / "back")


def test_gemma_that_also_reads_images(tmp_path):
    """The language model inside is imported, under a config.json of its own."""
    from safetensors.torch import save_file

    from megatron_infifpo.convert.fingerprint import weights_fingerprint

    text = tiny.save_model(tmp_path / "text", "gemma3")
    weights = tiny.load_weights(text)
    for style, (body, head) in {
        "transformers-4": ("language_model.model.", "language_model."),
        "transformers-5": ("model.language_model.", ""),
    }.items():
        folder = tmp_path / style
        folder.mkdir()
        renamed = {
            body + name.removeprefix("model.") if name.startswith("model.") else head + name: value
            for name, value in weights.items()
        }
        renamed["vision_tower.vision_model.head.weight"] = torch.zeros(2, 2)
        renamed["model.multi_modal_projector.mm_soft_emb_norm.weight"] = torch.zeros(2)
        save_file(renamed, folder / "model.safetensors")
        config = json.loads((text / "config.json").read_text())
        outer = {"model_type": "gemma3", "text_config": config, "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(outer))
        import_checkpoint(folder, tmp_path / f"{style}-megatron")
        export_checkpoint(tmp_path / f"{style}-megatron", tmp_path / f"{style}-back")
        assert_same_weights(text, tmp_path / f"{style}-back")
        back = json.loads((tmp_path / f"{style}-back" / "config.json").read_text())
        assert back["model_type"] == "gemma3_text"
        prints = {weights_fingerprint(f) for f in (text, folder, tmp_path / f"{style}-megatron")}
        assert len(prints) == 1
