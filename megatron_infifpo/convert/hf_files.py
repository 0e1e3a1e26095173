"""The files of a Hugging Face folder's weights, and the tensors in them as they are stored."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.beside import check_strangers
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
        kind = self.content_type(name)
        if kind not in DTYPES:
            raise UserError(
                f"{self.directory}: tensor {name} is {kind}, expected one of {', '.join(DTYPES)}: "
                "save the weights in one of these"
            )
        return DTYPES[kind]

    def content_type(self, name: str) -> str:
        """Dtype of a tensor as the format calls it."""
        file, inside = self._files[name]
        return file.dtypes[inside]

    def content(self, name: str) -> tuple[str, Tensor]:
        """Dtype and bytes of a tensor of any dtype: torch's name of it, or the format's."""
        file, inside = self._files[name]
        kind = file.dtypes[inside]
        return str(DTYPES.get(kind, kind)), file.read_bytes(inside)

    def load(self, name: str, scratch: Scratch | None = None) -> Tensor:
        """Return a tensor, in memory of its own or in the scratch memory."""
        file, inside = self._files[name]
        return file.read(inside, scratch)


def some(names: Sequence[str]) -> str:
    """Name the first of some tensors, and say how many there are."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
