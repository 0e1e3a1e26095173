"""Which models can be planned: those of the families, published ones by name."""

from pathlib import Path
from typing import Any

from megatron_infifpo.families import PUBLISHED, megatron_args
from megatron_infifpo.families.architecture import read_hf_config

# What shapes follow from in config.json files of published models that no test of the families has.
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.3-70b": {
        "model_type": "llama", "head_dim": 128, "hidden_act": "silu", "hidden_size": 8192,
        "intermediate_size": 28672, "max_position_embeddings": 131072, "num_attention_heads": 64,
        "num_hidden_layers": 80, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "vocab_size": 128256,
    },
}  # fmt: skip
NAMES = (*PUBLISHED, *MODELS)


def planned_model(name: str) -> dict[str, Any]:
    """Return Megatron's arguments of a model: of a folder, or of one of `NAMES`.

    Raises:
        UserError: there is no such folder, or an architecture that is not known.
    """
    if name in NAMES and not Path(name).is_dir():
        return megatron_args({**PUBLISHED, **MODELS}[name])
    return megatron_args(read_hf_config(name))
