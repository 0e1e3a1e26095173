"""Load checkpoints of local layers that were written before their norms had an extra state.

Transformer Engine's norms have one, always empty. Local layers now save it too, so that checkpoints
move between kinds of layers; before, they did not.
"""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

_ENDING = "norm._extra_state"


def accept_older[T: Sequence[torch.nn.Module]](checkpoint: TorchDistCheckpoint, models: T) -> T:
    """Let models do without the extra states of norms when they load this checkpoint.

    Does nothing where the checkpoint has them. They are back once a model has been loaded.

    Args:
        checkpoint: that is about to be loaded.
        models: GPTModel chunks, not wrapped.

    Returns:
        The models, as Megatron's hooks do.
    """
    if not checkpoint.has_object(f"decoder.final_layer{_ENDING}"):
        for model in models:
            _do_without(model)
    return models


def _do_without(model: Any) -> None:
    whole = model.sharded_state_dict

    def without(*args: Any, **options: Any) -> dict[str, Any]:
        return {k: v for k, v in whole(*args, **options).items() if not k.endswith(_ENDING)}

    def fill(module: torch.nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        handle.remove()
        del model.sharded_state_dict
        for name in module.state_dict():
            if name.endswith(_ENDING):
                state.setdefault(prefix + name, None)

    model.sharded_state_dict = without
    handle = model.register_load_state_dict_pre_hook(fill)
