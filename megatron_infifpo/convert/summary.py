"""What a checkpoint is, in a few lines."""

from pathlib import Path
from typing import Any

from megatron_infifpo.convert.hf_folder import check_weights, open_hf
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.convert.model_weights import AdaptedWeights
from megatron_infifpo.families import megatron_args, tensor_parallel_sizes
from megatron_infifpo.storage.checkpoints import find_checkpoint


def describe(
    directory: str | Path, iteration: int | None = None, hf: str | Path | None = None
) -> dict[str, str]:
    """Describe a Hugging Face folder or a Megatron checkpoint; the values are for reading.

    Args:
        directory: of either kind.
        iteration: of a checkpoint; default: the latest.
        hf: of a checkpoint that carries no config.json, the Hugging Face folder that has it.

    Raises:
        UserError: neither kind of folder, or its tensors do not fit its config.json.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file():
        weights, mapping, config = open_hf(directory)
        dtypes = set(check_weights(weights, mapping))
        facts = {"format": "Hugging Face safetensors"}
    else:
        opened, mapping, config = open_checkpoint(directory, iteration, hf=hf)
        dtypes = {opened.dtype(entries[0]) for entries in mapping.tensors.values()}
        facts = {
            "format": "Megatron torch_dist",
            "iteration": find_checkpoint(directory, iteration).name,
        }
        if isinstance(opened, AdaptedWeights):
            lora = opened.lora
            targets = ", ".join(lora.targets)
            facts["adapters"] = f"rank {lora.rank}, alpha {lora.alpha:g}, of {targets}"
    args = megatron_args(config)
    tied = not args["untie_embeddings_and_output_weights"]
    return facts | {
        "family": config["model_type"],
        "layers": str(args["num_layers"]),
        "hidden size": f"{args['hidden_size']}, MLP {args['ffn_hidden_size']}",
        **_experts(args),
        "heads": f"{args['num_attention_heads']} of {args['kv_channels']}, "
        f"{args['num_query_groups']} key-value",
        "vocabulary": f"{args['padded_vocab_size']}, {'tied' if tied else 'untied'}",
        "context": str(args["max_position_embeddings"]),
        "parameters": f"{mapping.parameters:,}",
        "dtype": ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        "flags": " ".join(_flags_of_its_own(args)),
        "legal TP": ", ".join(map(str, tensor_parallel_sizes(args))),
    }


def _experts(args: dict[str, Any]) -> dict[str, str]:
    """What experts a model has, and over how many ranks they can be spread; nothing without."""
    if not (experts := args.get("num_experts")):
        return {}
    sparse = sum(args["moe_layer_freq"])
    shared = args["moe_shared_expert_intermediate_size"]
    also = f", and a shared one of {shared}" if shared else ""
    sizes = [str(size) for size in range(1, experts + 1) if experts % size == 0]
    return {
        "experts": f"{experts} of {args['moe_ffn_hidden_size']} in {sparse} layers, "
        f"{args['moe_router_topk']} a token{also}",
        "legal EP": ", ".join(sizes),
    }


def _flags_of_its_own(args: dict[str, Any]) -> list[str]:
    """Flags that Megatron-LM itself needs beside --use-checkpoint-args, which leaves them out."""
    if args["extras"] or "rope" in args:
        return ["none: Megatron-LM's GPT model lacks this family's layers"]
    flags = [f"--norm-epsilon {args['layernorm_epsilon']!r}"]
    if args["qk_layernorm"]:
        flags.append("--qk-layernorm")
    if args["window_size"] is not None:
        flags.append(f"--window-size {args['window_size'][0]},{args['window_size'][1]}")
    if args["window_attn_skip_freq"] is not None:
        pattern = ",".join(map(str, args["window_attn_skip_freq"]))
        flags.append(f"--window-attn-skip-freq [{pattern}]")
    if args["use_rope_scaling"]:
        flags.append("--use-rope-scaling")
    if args.get("num_experts"):
        flags += _flags_of_experts(args)
    return flags


def _flags_of_experts(args: dict[str, Any]) -> list[str]:
    """The same of experts."""
    pattern = ",".join(map(str, args["moe_layer_freq"]))
    flags = [f"--moe-layer-freq [{pattern}]"]
    if args["moe_router_pre_softmax"]:
        flags.append("--moe-router-pre-softmax")
    if args["moe_shared_expert_gate"]:
        flags.append("--moe-shared-expert-gate")
    return flags
