"""The weights of a Hugging Face folder: which files, which names, and whether they fit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.convert.hf_files import HfWeights, some
from megatron_infifpo.convert.mxfp4 import Mxfp4Weights
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES, family, quantization, weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import WeightMapping
from megatron_infifpo.storage.beside import check_quantized


def open_hf(directory: str | Path) -> tuple[HfWeights, WeightMapping, dict[str, Any]]:
    """Open a folder's weights, with the mapping of its model and the model's own config.json.

    Raises:
        UserError: an unsupported model, or files that cannot be read.
    """
    config = read_hf_config(directory)
    kind = family(config)
    check_quantized(Path(directory), kind.text_config(config) if kind.packed else config)
    return weights_of(directory, config), weight_mapping(config), kind.text_config(config)


def weights_of(directory: str | Path, config: Mapping[str, Any]) -> HfWeights:
    """Open a folder's tensors, by their names in the rows of its family, if it is a known one.

    Args:
        directory: the folder.
        config: its config.json.

    Raises:
        UserError: files that cannot be read.
    """
    kind, method = FAMILIES.get(str(config.get("model_type"))), quantization(config)
    if kind is None:  # scored by transformers: names are taken as they are
        return HfWeights(directory)
    packed = method is not None and method == kind.packed
    return (Mxfp4Weights if packed else HfWeights)(directory, kind.hf_name)


def check_weights(weights: HfWeights, mapping: WeightMapping) -> dict[torch.dtype, str]:
    """Compare a folder's tensors with those that its configuration asks for.

    Returns:
        The dtypes of the weights, with the name of a tensor of each.

    Raises:
        UserError: a tensor is missing, surplus or of another shape, or of a dtype that no model is
            trained in.
    """
    where = weights.directory
    shapes = {
        name: shape
        for entry in mapping.entries()
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    found = set(weights.names())
    if missing := sorted(shapes.keys() - found):
        raise UserError(
            f"{where}: tensor {some(missing)} is missing: config.json asks for it, "
            "so the folder is incomplete or of another model"
        )
    if surplus := sorted(found - shapes.keys() - _tied_head(weights, mapping)):
        raise UserError(
            f"{where}: tensor {some(surplus)} is unknown: config.json describes a model without "
            "it, so converting would lose weights"
        )
    for name, shape in shapes.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"{where}: tensor {name} has shape {list(weights.shape(name))}, but config.json "
                f"asks for {list(shape)}"
            )
    return {weights.dtype(name): name for name in shapes}


def only_dtype(dtypes: dict[torch.dtype, str], directory: str | Path) -> torch.dtype:
    """The dtype of weights that have one.

    Raises:
        UserError: they have several.
    """
    if len(dtypes) > 1:
        mixed = " and ".join(f"{name} {dtype}" for dtype, name in dtypes.items())
        raise UserError(
            f"{directory}: weights have mixed dtypes ({mixed}): say with --dtype which one all of "
            "them get"
        )
    return next(iter(dtypes))


def _tied_head(weights: HfWeights, mapping: WeightMapping) -> set[str]:
    """Names of a copy of the embedding that some tied models store as their output layer."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = "output_layer.weight" not in mapping.rows
    if not tied or head not in weights.names():
        return set()
    if not torch.equal(weights.load(head).float(), weights.load(embedding).float()):
        raise UserError(
            f"{weights.directory}: config.json ties the output layer to the embedding, but "
            f"{head} differs from {embedding}: set tie_word_embeddings to false if it is right"
        )
    return {head}
