"""The weights of a Hugging Face folder: which files, which names, and whether they fit."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import family, weight_mapping
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.families.mapping import WeightMapping
from megatron_infifpo.storage.beside import check_quantized, check_strangers
from megatron_infifpo.storage.safetensors_io import DTYPES, SafetensorsFile, Scratch

INDEX = "model.safetensors.index.json"
# Buffers that old files hold and that follow from config.json.
_DERIVED = "rotary_emb.inv_freq"


def open_files(
    directory: str | Path, rename: Callable[[str], str | None] = str
) -> dict[str, tuple[SafetensorsFile, str]]:
    """Open a Hugging Face folder's safetensors.

    Args:
        directory: of the files.
        rename: from names in the files to others; None leaves a tensor out.

    Returns:
        By name, the file of every tensor and its name in there.

    Raises:
        UserError: no such folder, no safetensors in it, or a broken file.
    """
    found: dict[str, tuple[SafetensorsFile, str]] = {}
    for path in _paths(Path(directory)):
        file = SafetensorsFile(path)
        for name in file.shapes:
            known = rename(name)
            if known is None or known.endswith(_DERIVED):
                continue
            if known in found:
                raise UserError(
                    f"{directory}: tensor {known} is in {found[known][0].path.name} and in "
                    f"{path.name}: remove the file that does not belong there"
                )
            found[known] = (file, name)
    return found


def _paths(directory: Path) -> list[Path]:
    """The folder's files of weights."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder: expected a Hugging Face checkpoint")
    single, index = directory / "model.safetensors", directory / INDEX
    found = [single] if single.is_file() else []
    if index.is_file():
        indexed = _indexed(index)
        # transformers would load the single file, and other programs those of the index.
        if found and indexed != found:
            raise UserError(
                f"{directory} holds model.safetensors and an index of other files "
                f"({indexed[0].name}): remove one of both models"
            )
        found = indexed
    if found:
        check_strangers(directory, found)
        return found
    if any(directory.glob("*.bin")):
        raise UserError(
            f"{directory} holds pickled weights (*.bin), which can run code when loaded: "
            "expected model.safetensors, convert them with save_pretrained on a machine "
            "where you trust them"
        )
    raise UserError(f"{directory} holds neither model.safetensors nor {INDEX}")


def _indexed(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        found = [index.with_name(Path(name).name) for name in sorted(names)]
    except (ValueError, KeyError, TypeError, AttributeError):
        found = []
    if not found:
        raise UserError(
            f"{index} is not an index: expected a JSON object with a weight_map of "
            "tensor names to file names; copy the file again"
        )
    return found


class HfWeights:
    """The language model's tensors in a Hugging Face folder, by their names in a family's rows."""

    def __init__(self, directory: str | Path, rename: Callable[[str], str | None] = str):
        """Open the folder's safetensors; arguments and errors as those of `open_files`."""
        self.directory = Path(directory)
        self._files = open_files(directory, rename)

    def names(self) -> list[str]:
        """Names of all tensors, sorted, without buffers that follow from the configuration."""
        return sorted(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        file, inside = self._files[name]
        return file.shapes[inside]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor; UserError if it is none that a model is trained in."""
        file, inside = self._files[name]
        kind = file.dtypes[inside]
        if kind not in DTYPES:
            raise UserError(
                f"{self.directory}: tensor {name} is {kind}, expected one of {', '.join(DTYPES)}: "
                "save the weights in one of these"
            )
        return DTYPES[kind]

    def content(self, name: str) -> tuple[str, Tensor]:
        """Dtype and bytes of a tensor of any dtype: torch's name of it, or the format's."""
        file, inside = self._files[name]
        kind = file.dtypes[inside]
        return str(DTYPES.get(kind, kind)), file.read_bytes(inside)

    def load(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor, in memory of its own or in the scratch memory."""
        file, inside = self._files[name]
        return file.read(inside, scratch)


def open_hf(directory: str | Path) -> tuple[HfWeights, WeightMapping, dict[str, Any]]:
    """Open a folder's weights, with the mapping of its model and the model's own config.json.

    Raises:
        UserError: an unsupported model, or files that cannot be read.
    """
    config = read_hf_config(directory)
    check_quantized(Path(directory), config)
    kind = family(config)
    weights = HfWeights(directory, kind.hf_name)
    return weights, weight_mapping(config), kind.text_config(config)


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


def some(names: Sequence[str]) -> str:
    """Name the first of some tensors, and say how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
