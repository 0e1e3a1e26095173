"""Checkpoints that others trained: what they say of the model, held against its config.json.

Shapes do not tell a rope's base, an epsilon or a window: a model with another one is another model.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.common_state import read_arguments
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

# Megatron arguments, and what else Megatron-LM's command line and configurations call them.
_CHECKED = {
    "num_attention_heads": (),
    "num_query_groups": (),
    "kv_channels": (),
    "rotary_base": (),
    "rotary_percent": (),
    "rotary_interleaved": (),
    "layernorm_epsilon": ("norm_epsilon",),
    "normalization": (),
    "layernorm_zero_centered_gamma": ("apply_layernorm_1p",),
    "swiglu": ("gated_linear_unit",),
    "window_size": (),
    "window_attn_skip_freq": (),
    "use_rope_scaling": ("rope_scaling",),
    "moe_router_topk": (),
    "moe_router_pre_softmax": (),
}
RUN_CONFIG = "run_config.yaml"  # Megatron-Bridge's, in an iteration's folder
_NEMO = Path("context") / "model.yaml"  # NeMo 2's, beside its folder of weights


def check_arguments(checkpoint: TorchDistCheckpoint, args: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that was trained as another model than its config.json describes.

    One that says nothing of how it was trained is checked by its tensors alone.

    Args:
        checkpoint: of any program.
        args: Megatron arguments of the model.

    Raises:
        UserError: names an argument, and both values.
    """
    trained = _trained_with(checkpoint)
    args = {**args, "rotary_interleaved": bool(args["extras"].get("interleaved"))}
    for name, others in _CHECKED.items():
        theirs = next((trained[one] for one in (name, *others) if one in trained), None)
        ours = args.get(name)
        if theirs is not None and ours is not None and _plain(theirs) != _plain(ours):
            raise UserError(
                f"{checkpoint.directory} was trained with {name} {theirs!r}, but config.json makes "
                f"it {ours!r}: it is a checkpoint of another model"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _trained_with(checkpoint: TorchDistCheckpoint) -> dict[str, Any]:
    """Settings of a model, as Megatron-LM, Megatron-Bridge or NeMo stored them."""
    folder = checkpoint.directory
    found = (
        read_arguments(checkpoint)
        or _section(folder / RUN_CONFIG, "model")
        or _section(folder.parent / _NEMO, "config")
    )
    # Arguments of grouped queries have a value where there are none, too.
    if found.get("group_query_attention") is False:
        found.pop("num_query_groups", None)
    every = found.get("window_attn_skip_freq")
    if type(every) is int:  # all layers but every so many
        layers = range(1, 1 + found["num_layers"])
        found["window_attn_skip_freq"] = [int(layer % every != 0) for layer in layers]
    return found


def _section(path: Path, name: str) -> dict[str, Any]:
    """A part of a YAML file, and what it holds inside; empty without such a file."""
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    section = content.get(name) if isinstance(content, dict) else None
    if not isinstance(section, dict):
        return {}
    inner = section.get("transformer")  # of Megatron's own model configurations
    return {**section, **inner} if isinstance(inner, dict) else section
