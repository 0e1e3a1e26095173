"""Model families: from Hugging Face's `config.json` to Megatron arguments and tensor names.

A family is one file, or a folder where its layers differ, and its entry in `FAMILIES`: nothing else
knows it by name. See docs/adding-a-model.md.
"""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import (
    gemma3,
    glm,
    glm4,
    gpt_oss,
    granite,
    llama,
    mistral,
    mistral3,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    smollm3,
)
from megatron_infifpo.families.common import Family, FamilyLayers
from megatron_infifpo.families.mapping import WeightMapping

# By config.json's model_type.
FAMILIES: dict[str, Family] = {
    "gemma3": gemma3.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "glm": glm.FAMILY,
    "glm4": glm4.FAMILY,
    "gpt_oss": gpt_oss.FAMILY,
    "granite": granite.FAMILY,
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "mistral3": mistral3.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmo2": olmo2.FAMILY,
    "olmo3": olmo3.FAMILY,
    "phi3": phi3.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
    "smollm3": smollm3.FAMILY,
}

# What the families know of published models and of tiny ones, by name; and of the tiny ones one of
# each family that has layers of its own.
PUBLISHED = {name: config for kind in FAMILIES.values() for name, config in kind.published.items()}
TINY = {name: config for kind in FAMILIES.values() for name, config in kind.tiny.items()}
OWN_LAYERS = tuple(
    dict.fromkeys(
        next(iter(kind.tiny)) for kind in FAMILIES.values() if kind.layers is not FamilyLayers
    )
)

# Arguments of Megatron's that may be lists with an entry for each layer.
PER_LAYER = ("window_attn_skip_freq", "moe_layer_freq")

_SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "num_experts",
    "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step",
    "shared_expert_intermediate_size",
)  # fmt: skip
_LARGEST = 1 << 27


def family(hf_config: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`.

    Raises:
        UserError: an unknown architecture, or quantized weights.
    """
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"config.json: model_type is {model_type!r}, expected one of "
            f"{', '.join(FAMILIES)}: docs/adding-a-model.md says how to add a family"
        )
    kind, method = FAMILIES[model_type], quantization(hf_config)
    if method not in (None, kind.packed):
        raise UserError(
            f"config.json has a quantization_config ({method}): quantized weights are not "
            "supported in a pivot, so take the original checkpoint; a source's may be: score it "
            "with --backend transformers, or with megatron if it is FP8 with a weight_block_size"
        )
    return kind


def quantization(hf_config: Mapping[str, Any]) -> str | None:
    """How a config.json says that weights are quantized; None where they are not."""
    found = hf_config.get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else None
    return str(method or "an unknown method")


def megatron_args(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """From a Hugging Face configuration to Megatron arguments, by their argparse names.

    `padded_vocab_size` is the model's real vocabulary size, without padding.

    Raises:
        UserError: an unknown architecture, or a feature that Megatron computes otherwise.
    """
    kind = family(hf_config)
    try:
        _check_sizes(kind.text_config(hf_config))
        return kind.megatron_args(hf_config)
    except (TypeError, AttributeError, ArithmeticError) as error:  # no KeyError: that is ours
        raise UserError(
            f"config.json has a value of another type than {hf_config['model_type']} models have "
            f"({type(error).__name__}: {error}): copy the file again"
        ) from error


def _check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse sizes that are no sizes, before anybody computes with them."""
    for name in _SIZES:
        value = config.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= _LARGEST):
            raise UserError(f"config.json: {name} is {value!r}, expected a positive integer")


def weight_mapping(hf_config: Mapping[str, Any]) -> WeightMapping:
    """Return the mapping of every tensor of the model that a `config.json` describes."""
    return WeightMapping(family(hf_config).rows, megatron_args(hf_config))


def one_layer(args: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Return the Megatron arguments of a model that has just this layer of another one."""

    def of_layer(value: Any) -> Any:
        return [value[layer]] if isinstance(value, list) else value

    extras = {name: of_layer(value) for name, value in args["extras"].items()}
    own = {name: of_layer(args[name]) for name in PER_LAYER if name in args}
    return {**args, **own, "num_layers": 1, "extras": extras}


def tensor_parallel_sizes(args: Mapping[str, Any]) -> list[int]:
    """Tensor-parallel sizes that are legal for a model, ascending.

    Args:
        args: Megatron arguments, as `megatron_args` returns them.
    """
    # Above the number of key-value heads Megatron gathers k and v on every rank in every layer:
    # no memory is saved where it works, so those sizes are left out.
    sizes = (args["num_attention_heads"], args["num_query_groups"], *split_widths(args))
    return [tp for tp in range(1, min(sizes) + 1) if all(size % tp == 0 for size in sizes)]


def split_widths(args: Mapping[str, Any]) -> list[int]:
    """Inner widths of the MLPs that tensor parallelism splits: not those of experts."""
    dense = not args.get("num_experts") or 0 in args["moe_layer_freq"]
    found = [args["ffn_hidden_size"]] if dense else []
    shared = args.get("moe_shared_expert_intermediate_size")
    return found if shared is None else [*found, shared]


def check_pipeline_parallel(args: Mapping[str, Any], pp: int, virtual: int = 1) -> None:
    """Raise UserError, naming the legal sizes, if layers cannot be split evenly.

    Args:
        args: Megatron arguments.
        pp: pipeline stages.
        virtual: model chunks of each stage.
    """
    layers = args["num_layers"]
    if layers % pp:
        legal = [str(size) for size in range(1, layers + 1) if layers % size == 0]
        raise UserError(
            f"--pipeline-model-parallel-size is {pp}, expected one of {', '.join(legal)}: it must "
            f"divide the model's {layers} layers"
        )
    if (layers // pp) % virtual:
        each = layers // pp
        legal = [str(size) for size in range(1, each + 1) if each % size == 0]
        raise UserError(
            f"{virtual} virtual stages a pipeline rank, expected one of {', '.join(legal)}: they "
            f"must divide the rank's {each} layers"
        )


def check_tensor_parallel(args: Mapping[str, Any], tp: int) -> None:
    """Raise UserError, naming the legal sizes, if the model cannot be split over `tp` ranks."""
    legal = tensor_parallel_sizes(args)
    if tp not in legal:
        units = "".join(f" and {width} MLP units" for width in split_widths(args))
        heads = f"{args['num_attention_heads']} attention heads"
        heads += f"{',' if units else ' and'} {args['num_query_groups']} key-value heads"
        raise UserError(
            f"--tensor-model-parallel-size is {tp}, expected one of {', '.join(map(str, legal))}: "
            f"it must divide the model's {heads}{units}"
        )


def check_expert_parallel(
    args: Mapping[str, Any], expert: int, expert_tensor: int | None = None
) -> None:
    """Raise UserError, naming the legal sizes, if experts cannot be split over ranks.

    Args:
        args: Megatron arguments.
        expert: ranks that the experts of a layer are spread over.
        expert_tensor: ranks that each expert is split over; None: 1.
    """
    experts = args.get("num_experts")
    for flag, size in (
        ("--expert-model-parallel-size", expert),
        ("--expert-tensor-parallel-size", expert_tensor or 1),
    ):
        if not experts:
            if size > 1:
                raise UserError(f"{flag} is {size}, but the model has no experts: leave it out")
            continue
        whole, what = experts, f"{experts} experts of a layer"
        if "tensor" in flag:
            whole = args["moe_ffn_hidden_size"]
            what = f"{whole} units of an expert"
            if args.get("add_bias_linear"):
                whole, what = 1, "experts, which Megatron does not split where they have biases"
        if whole % size:
            legal = [str(n) for n in range(1, whole + 1) if whole % n == 0]
            raise UserError(
                f"{flag} is {size}, expected one of {', '.join(legal)}: it must divide the "
                f"model's {what}"
            )
