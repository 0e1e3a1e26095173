"""transformers' parameters and the tensors of its files: it joins experts when it loads them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig


def as_saved(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors like a model's parameters under the names, and in the shapes, of its files."""
    saved: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return saved


def load_tensors(model: Any, tensors: Mapping[str, Tensor]) -> set[str]:
    """Fill some of a model's parameters, in place.

    Args:
        model: of transformers, not quantized.
        tensors: by the names that they have in its files.

    Returns:
        Names of parameters that were not filled.
    """
    rules = LoadStateDictConfig(weight_mapping=get_model_conversion_mapping(model))
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), rules)
    finally:
        if shown:
            logging.enable_progress_bar()
    assert not (found.unexpected_keys or found.mismatched_keys or found.conversion_errors), found
    missing: set[str] = found.missing_keys
    return missing
