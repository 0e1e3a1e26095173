"""The language model inside of one that also reads images: Mistral-Small 3.1."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_infifpo.convert.fingerprint import weights_fingerprint
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.engine.hf_model import load_causal_lm
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import PUBLISHED, megatron_args
from support import tiny

TEXT = {
    **tiny.SHAPE, "model_type": "mistral", "head_dim": 24, "vocab_size": 301, "rms_norm_eps": 1e-5,
    "sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
VISION = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14,
}  # fmt: skip


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """As transformers saves it: with an outer word about ties that its weights contradict."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model("mistral3", text_config=TEXT, vision_config=VISION)
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config).float()
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    folder = tmp_path_factory.mktemp("mistral3") / "hf"
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder, 300)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    return folder


def renamed(name: str) -> str:
    """Names of transformers 5's own modules."""
    name = name.replace("language_model.model.", "model.language_model.")
    name = name.replace("language_model.lm_head.", "lm_head.")
    return f"model.{name}" if name.startswith(("vision_tower.", "multi_modal_")) else name


def test_it_is_a_mistral(hf, tmp_path):
    """Imported by either kind of names, and exported as what it is: to the bit."""
    other = tmp_path / "renamed"
    other.mkdir()
    weights = load_file(hf / "model.safetensors")
    save_file({renamed(k): v for k, v in weights.items()}, other / "model.safetensors")
    (other / "config.json").write_text((hf / "config.json").read_text())
    prints = set()
    for number, folder in enumerate((hf, other)):
        import_checkpoint(folder, tmp_path / f"megatron{number}")
        back = tmp_path / f"back{number}"
        export_checkpoint(tmp_path / f"megatron{number}", back)
        config = json.loads((back / "config.json").read_text())
        assert config["model_type"] == "mistral" and "vision_config" not in config
        found = load_file(back / "model.safetensors")
        text = {k: v for k, v in weights.items() if k.startswith("language_model.")}
        assert found.keys() == {name.removeprefix("language_model.") for name in text}
        assert all(torch.equal(found[k.removeprefix("language_model.")], text[k]) for k in text)
        prints |= {weights_fingerprint(f) for f in (folder, tmp_path / f"megatron{number}", back)}
    assert len(prints) == 1


def test_both_compute_the_same(ranks, hf, tmp_path):
    """transformers' model of text and images, without images, and Megatron's, at TP 2."""
    import_checkpoint(hf, tmp_path / "megatron")
    flags = ["--hf", str(hf), "--load", str(tmp_path / "megatron"), "--tolerance", "1e-4"]
    flags += ["--tensor-model-parallel-size", "2"]
    for more in ([], ["--by-layers"]):
        assert ranks(2, "support.conversion:verify", [*flags, *more]) == [0, 0]
        assert any("equal within the tolerance of 0.0001" in log for log in ranks.logs)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    models = [load_causal_lm(f, dtype=torch.float32) for f in (hf, tmp_path / "back")]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(*(model(ids).logits for model in models))


def test_another_model_inside_is_refused():
    config: dict[str, Any] = {**PUBLISHED["mistral-small-3.1-24b"]}
    for inner in ({**config["text_config"], "model_type": "ministral3"}, None):
        with pytest.raises(UserError, match="model_type is .*, expected 'mistral': of models that"):
            megatron_args({**config, "text_config": inner})
