"""What Megatron-Bridge reads beside a checkpoint's tensors: `run_config.yaml`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_infifpo.convert.foreign import RUN_CONFIG
from megatron_infifpo.convert.megatron_folder import open_checkpoint
from megatron_infifpo.convert.model_weights import AdaptedWeights
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.storage.checkpoints import HF_FOLDER, find_checkpoint

_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"
# Its fields that are called as Megatron's arguments.
_SAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "layernorm_epsilon", "normalization", "layernorm_zero_centered_gamma",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_base", "rotary_percent",
    "window_size", "window_attn_skip_freq", "vocab_size", "make_vocab_size_divisible_by",
)  # fmt: skip
_EXPERTS = (
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
)  # fmt: skip


def write_run_config(load_dir: str | Path, iteration: int | None = None) -> Path:
    """Write into an iteration's folder what Megatron-Bridge needs to read it.

    Args:
        load_dir: of an imported or trained checkpoint.
        iteration: which one; default: the latest.

    Returns:
        The file.

    Raises:
        UserError: not a checkpoint, one of adapters, a model that Megatron-Bridge's GPT models are
            not, or such a file is there.
    """
    folder = find_checkpoint(load_dir, iteration)
    weights, mapping, config = open_checkpoint(load_dir, iteration)
    if isinstance(weights, AdaptedWeights):
        raise UserError(f"{load_dir} holds adapters: export them with --adapter-only instead")
    args = megatron_args(config)
    if args["extras"] or "rope" in args:
        raise UserError(
            f"a {config['model_type']} model of this config.json has layers or a rope that "
            "Megatron's GPT model lacks: export it, and import the Hugging Face folder there"
        )
    path = folder / RUN_CONFIG
    dtype = weights.dtype(next(mapping.entries()))
    tokenizer = {
        "_target_": _TOKENIZER,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str((Path(load_dir) / HF_FOLDER).resolve()),
    }
    content = {
        "model": provider(args, dtype),
        "tokenizer": tokenizer,
        # No optimizer state, and no states of random numbers, that it could take.
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
    }
    try:
        with path.open("x", encoding="utf-8") as file:
            yaml.safe_dump(content, file, sort_keys=False)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return path


def provider(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return a model as Megatron-Bridge's `GPTModelProvider` describes it, as plain data.

    Args:
        args: Megatron arguments of a model without layers of its own.
        dtype: of its weights.
    """
    found = {name: args[name] for name in _SAME if args.get(name) is not None}
    if args.get("num_experts"):
        found["num_moe_experts"] = args["num_experts"]
        found |= {name: args[name] for name in _EXPERTS if args[name] is not None}
        found |= {"moe_grouped_gemm": True, "moe_token_dispatcher_type": "alltoall"}
        found |= {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.0}
    if "window_size" in found:
        found["window_size"] = list(found["window_size"])
    if args["use_rope_scaling"]:
        found |= {"rope_scaling": True, "rope_scaling_factor": args["rope_scaling_factor"]}
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    precisions = {half[dtype]: True} if dtype in half else {}
    return {
        "_target_": _PROVIDER,
        **found,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "seq_length": args["max_position_embeddings"],
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": {"_target_": str(dtype), "_call_": False},
        **precisions,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
