"""What a checkpoint is, in a few lines."""

from pathlib import Path

import torch

from megatron_infifpo.checkpoint.hf_export import open_checkpoint
from megatron_infifpo.checkpoint.hf_folder import check_weights, open_hf
from megatron_infifpo.checkpoint.layout import find_checkpoint
from megatron_infifpo.models.families import megatron_args, tensor_parallel_sizes


def describe(directory: str | Path, iteration: int | None = None) -> dict[str, str]:
    """Describe a Hugging Face folder or a Megatron checkpoint; the values are for reading.

    Raises:
        UserError: neither kind of folder, or its tensors do not fit its config.json.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        weights, mapping, config = open_hf(directory)
        dtypes = {check_weights(weights, mapping)}
        facts = {"format": "Hugging Face safetensors"}
    else:
        checkpoint, mapping, config = open_checkpoint(directory, iteration)
        dtypes = {checkpoint.dtype(key) for key in mapping.rows}
        facts = {
            "format": "Megatron torch_dist",
            "iteration": find_checkpoint(directory, iteration).name,
        }
    args = megatron_args(config)
    parameters = sum(torch.Size(entry.shape).numel() for entry in mapping.entries())
    tied = not args["untie_embeddings_and_output_weights"]
    return facts | {
        "family": config["model_type"],
        "layers": str(args["num_layers"]),
        "hidden size": f"{args['hidden_size']}, MLP {args['ffn_hidden_size']}",
        "heads": f"{args['num_attention_heads']} of {args['kv_channels']}, "
        f"{args['num_query_groups']} key-value",
        "vocabulary": f"{args['padded_vocab_size']}, {'tied' if tied else 'untied'}",
        "context": str(args["max_position_embeddings"]),
        "parameters": f"{parameters:,}",
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        "legal TP": ", ".join(map(str, tensor_parallel_sizes(args))),
    }
