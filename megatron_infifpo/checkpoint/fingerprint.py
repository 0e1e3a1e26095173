"""Identity of a model's weights, whatever folder, files or parallel layout they are stored in."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from megatron_infifpo.checkpoint.hf_export import hf_tensors, open_checkpoint
from megatron_infifpo.checkpoint.hf_folder import HfWeights
from megatron_infifpo.checkpoint.safetensors_io import bytes_of
from megatron_infifpo.models.architecture import read_hf_config
from megatron_infifpo.models.families import FAMILIES


def weights_fingerprint(directory: str | Path) -> str:
    """Return the sha256 identity of the weights in a Hugging Face folder or Megatron checkpoint.

    It covers the names, dtypes, shapes and bytes of the Hugging Face tensors, not their order nor
    their files. A Megatron checkpoint (its latest iteration) has the fingerprint of the folder
    that it exports to in its own dtype, so importing keeps the identity. One tensor is in memory
    at a time.

    Raises:
        UserError: neither kind of folder.
    """
    is_hf = (Path(directory) / "config.json").is_file()
    tensors = _hf_tensors(directory) if is_hf else _megatron_tensors(directory)
    digests = {name: _digest(name, tensor) for name, tensor in tensors}
    whole = hashlib.sha256(b"".join(digests[name] for name in sorted(digests)))
    return whole.hexdigest()


def _hf_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    # Models of other families are scored by transformers: their names are taken as they are.
    known = FAMILIES.get(str(read_hf_config(directory).get("model_type")))
    weights = HfWeights(directory, known.hf_name) if known else HfWeights(directory)
    for name in weights.names():
        yield name, weights.load(name)


def _megatron_tensors(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    checkpoint, mapping, _ = open_checkpoint(directory)
    for group in hf_tensors(checkpoint, mapping):
        yield from group.items()


def _digest(name: str, tensor: Tensor) -> bytes:
    header = f"{name} {tensor.dtype} {list(tensor.shape)}\n"
    digest = hashlib.sha256(header.encode())
    digest.update(bytes_of(tensor.contiguous()).numpy())
    return digest.digest()
