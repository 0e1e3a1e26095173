"""The architecture that a converted checkpoint carries, as Megatron arguments."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import (
    check_expert_parallel,
    check_pipeline_parallel,
    check_tensor_parallel,
    megatron_args,
)
from megatron_infifpo.families.experts import NO_EXPERTS
from megatron_infifpo.flag_types import flag
from megatron_infifpo.storage.beside import check_adapters
from megatron_infifpo.storage.checkpoints import HF_FOLDER

# The checkpoint's value is a starting point here, not part of the architecture.
_FREE = ("make_vocab_size_divisible_by", "seq_length", "tokenizer_type", "vocab_size")

# With one of these, stages have as many layers as the user says, and Megatron checks them.
_OWN_STAGES = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_per_virtual_pipeline_stage",
)


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """Read `config.json` of a Hugging Face folder, or of one carried in a converted checkpoint.

    Raises:
        UserError: there is none, it cannot be read, or an adapter is beside it.
    """
    check_adapters(Path(directory))
    for path in (Path(directory) / "config.json", Path(directory) / HF_FOLDER / "config.json"):
        if path.is_file():
            try:
                config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(
                    f"{path} is not JSON that can be read ({error}): copy the file again"
                ) from None
            if not isinstance(config, dict):
                raise UserError(f"{path} holds {type(config).__name__}, expected a JSON object")
            return config
    raise UserError(
        f"{directory} has neither config.json nor hf/config.json: expected a Hugging Face folder "
        "or a checkpoint written by infifpo import"
    )


def hf_files(directory: str | Path) -> Path:
    """Return where a model's config.json and tokenizer are.

    Args:
        directory: a Hugging Face folder, which is the answer, or a checkpoint that carries one.
    """
    directory = Path(directory)
    return directory if (directory / "config.json").is_file() else directory / HF_FOLDER


def architecture(
    given: Mapping[str, Any], defaults: Mapping[str, Any], checkpoint: Path
) -> dict[str, Any]:
    """Megatron arguments of the architecture that a checkpoint carries, by name.

    Args:
        given: flags of the command line.
        defaults: their defaults.
        checkpoint: its folder, or a Hugging Face folder.

    Raises:
        UserError: a flag on the command line contradicts the checkpoint, or the tensor- or
            pipeline-parallel size, or those of experts, are not legal for the model.
    """
    found = NO_EXPERTS | megatron_args(read_hf_config(checkpoint))
    for name, value in found.items():
        asked = given.get(name)
        if name not in _FREE and asked not in (defaults.get(name), value):
            raise UserError(
                f"{flag(name)} is {asked!r}, but the checkpoint in {checkpoint} has "
                f"{value!r}: leave architecture flags out, they come from the checkpoint"
            )
    check_tensor_parallel(found, given["tensor_model_parallel_size"])
    sizes = given["expert_model_parallel_size"], given["expert_tensor_parallel_size"]
    check_expert_parallel(found, *sizes)
    if all(given[name] == defaults[name] for name in _OWN_STAGES):
        virtual = given["num_virtual_stages_per_pipeline_rank"] or 1
        check_pipeline_parallel(found, given["pipeline_model_parallel_size"], virtual)
    return {k: v for k, v in found.items() if k not in _FREE or given.get(k) is None}
