"""Checkpoints as other programs leave them: other names of tensors, no config.json."""

import argparse
from pathlib import Path
from typing import Any

from support.conversion import build


def save(hf: str, folder: str, program: str, arguments: dict[str, Any]) -> None:
    """Let Megatron save a model as another program would.

    Args:
        hf: Hugging Face folder of it.
        folder: the checkpoint's.
        program: "megatron-lm", "megatron-lm-by-layer", "bridge" or "nemo".
        arguments: that Megatron-LM was started with, beside plain ones.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    from megatron_infifpo.convert.hf_weights import load_into_model
    from megatron_infifpo.families import megatron_args
    from megatron_infifpo.families.architecture import read_hf_config

    (model,) = build(hf, {})
    load_into_model([model], hf)
    if program == "megatron-lm-by-layer":
        model.config.hetereogenous_dist_checkpoint = True
    elif model.config.num_moe_experts and all(model.config.moe_layer_freq):
        model.config.moe_layer_freq = 1  # a number, as whoever does not know of the list writes it
    state: dict[str, Any] = {"iteration": 7}
    if program.startswith("megatron-lm"):
        known = {**megatron_args(read_hf_config(hf)), **arguments}
        known["norm_epsilon"] = known.pop("layernorm_epsilon")
        # Objects of classes of Megatron's, and one that only its owner has.
        owned = {"model_type": ModelType.encoder_or_decoder, "attention_backend": AttnBackend.auto}
        state |= {"args": argparse.Namespace(**known, **owned), "checkpoint_version": 3.0}
    nemo = program == "nemo"
    path = Path(folder) / ("weights" if nemo else "iter_0000007")
    path.mkdir(parents=True)
    prefix = "module." if nemo else ""
    state["state_dict" if nemo else "model"] = model.sharded_state_dict(prefix=prefix)
    dist_checkpointing.save(state, str(path))
    if not nemo:
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("7")


def verified(job: dict[str, Any]) -> list[Any]:
    """Verify a conversion: whether it passed, and what is said of the weights."""
    from megatron_infifpo.checks.conversion import VerificationJob, verify

    found = verify(VerificationJob(**job))
    return [found.passed, found.weights]
