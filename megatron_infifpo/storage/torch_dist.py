"""Megatron's torch_dist format, which is PyTorch's distributed checkpoint, read in slices."""

import math
import pickle
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.archives import Archives
from megatron_infifpo.storage.checkpoints import NEMO_PREFIX, TRACKER
from megatron_infifpo.storage.checksums import Checksums
from megatron_infifpo.storage.safetensors_io import Scratch, read_into


class _SlicePlanner(dcp.DefaultLoadPlanner):
    """Puts whatever is read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


_OTHER_METADATA_TYPES = {
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("builtins", "set"),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickle `.metadata` without running code that a stranger may have put there."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _OTHER_METADATA_TYPES
        # Plain records and constants of these modules, but none of their functions.
        ours = module == "torch" or module.startswith("torch.distributed.checkpoint.")
        if ours and module in sys.modules:
            value = super().find_class(module, name)
            known = isinstance(value, torch.dtype) or value is torch.Size or is_dataclass(value)
            known = known or (isinstance(value, type) and issubclass(value, Enum))
        if not known:
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata: Metadata = _MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        return metadata


# What unpickling damaged bytes raises, beside UnpicklingError.
BROKEN_PICKLE = (
    pickle.UnpicklingError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    OverflowError, MemoryError, ImportError, RuntimeError,
)  # fmt: skip


class TorchDistCheckpoint:
    """The tensors of a torch_dist folder, read in slices; optimizer state is not touched."""

    def __init__(self, directory: Path):
        """Read the folder's metadata.

        Raises:
            UserError: broken metadata.
        """
        self.directory = directory
        self.checksums = Checksums(directory)
        self._reader = _Reader(directory)
        self._archives = Archives()
        # Chunks of a tensor by where they begin, if they are one long in the first dimension.
        self._chunks: dict[str, dict[int | None, list[ChunkStorageMetadata]]] = {}
        try:
            self._metadata = self._reader.read_metadata()
            self._metadata.state_dict_metadata.items()
            stored = (self._metadata.storage_data or {}).values()
            paths = sorted({str(info.relative_path) for info in stored})
        except BROKEN_PICKLE as error:
            raise UserError(f"cannot read {directory}/.metadata: {error!r}") from error
        for path in paths:
            if Path(path).name != path:
                raise UserError(
                    f"{directory}/.metadata names {path!r}, expected files of that folder: it was "
                    "not written by Megatron"
                )
        size = (directory / ".metadata").stat().st_size
        self.checksums.check_range(".metadata", 0, size)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def check_sizes(self) -> None:
        """Check that every file is there, and as long as the metadata says at least.

        Raises:
            UserError: names a file that is missing or cut.
        """
        ends: dict[str, int] = {}
        for info in self._reader.storage_data.values():
            ends[info.relative_path] = max(
                ends.get(info.relative_path, 0), info.offset + info.length
            )
        for name, end in sorted(ends.items()):
            path = self.directory / name
            found = path.stat().st_size if path.is_file() else -1
            if found < end:
                what = "is missing" if found < 0 else f"has {found} bytes, expected {end}"
                raise UserError(
                    f"{path} {what}: the checkpoint is damaged or was copied in part; copy it "
                    f"again, or write the number of another one into {TRACKER}"
                )

    def names(self) -> Iterator[str]:
        """Keys of all model tensors."""
        for key, value in self._metadata.state_dict_metadata.items():
            model = key.removeprefix(NEMO_PREFIX).startswith(
                ("decoder.", "embedding.", "output_layer.")
            )
            if model and isinstance(value, TensorStorageMetadata):
                yield key

    def has_object(self, key: str) -> bool:
        """Whether there is an object of this key, in any number of shards."""
        return any(name.startswith(f"{key}/") for name in self._metadata.state_dict_metadata)

    def object_bytes(self, key: str) -> bytes | None:
        """Return an object as it is stored, unread; None if there is none of this key."""
        info = self._reader.storage_data.get(MetadataIndex(key))
        if info is None:
            return None
        with open(self.directory / info.relative_path, "rb") as file:
            file.seek(info.offset)
            return file.read(info.length)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor; `[L, ...]` for tensors of layers."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._tensor(key).properties.dtype

    def _tensor(self, key: str) -> TensorStorageMetadata:
        value = self._metadata.state_dict_metadata[key]
        assert isinstance(value, TensorStorageMetadata)
        return value

    def read(
        self,
        key: str,
        offset: tuple[int, ...],
        shape: tuple[int, ...],
        scratch: Scratch | None = None,
    ) -> Tensor:
        """Return the part of a tensor that begins at `offset` and has this shape.

        It is in memory of its own, or in the scratch memory.

        Raises:
            UserError: the files do not hold all of it, or are broken.
        """
        dtype = self.dtype(key)
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        try:
            items = create_read_items_for_chunk_list(key, self._near(key, offset, shape), [chunk])
        except BROKEN_PICKLE as error:
            raise UserError(f"{self.directory}/.metadata is broken at {key}: {error}") from error
        data = torch.empty(shape, dtype=dtype) if scratch is None else scratch.take(shape, dtype)
        if sum(math.prod(item.lengths) for item in items) != math.prod(shape):
            raise UserError(
                f"{self.directory} does not hold all of {key} at {list(offset)}: the checkpoint is "
                "incomplete or of another model"
            )
        for item in items:
            info = self._reader.storage_data[item.storage_index]
            self.checksums.check_range(info.relative_path, info.offset, info.offset + info.length)
        try:
            if not all(self._read_directly(item, data) for item in items):
                self._reader.read_data(dcp.LoadPlan(items), _SlicePlanner(data)).wait()
        except BROKEN_PICKLE as error:
            raise UserError(f"cannot read {key} from {self.directory}: {error}") from error
        return data

    def _near(
        self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> TensorStorageMetadata:
        """A tensor's description with those of its chunks alone that a part of it can be in.

        PyTorch looks at all of them, for every part: of experts there are as many parts as chunks.
        """
        tensor = self._tensor(key)
        if not shape or shape[0] != 1:
            return tensor
        if key not in self._chunks:
            by_first: dict[int | None, list[ChunkStorageMetadata]] = {}
            self._chunks[key] = by_first
            for chunk in tensor.chunks:
                first = (chunk.offsets[0], chunk.sizes[0])
                by_first.setdefault(first[0] if first[1] == 1 else None, []).append(chunk)
        found = self._chunks[key]
        return replace(tensor, chunks=found.get(offset[0], []) + found.get(None, []))

    def _read_directly(self, item: ReadItem, target: Tensor) -> bool:
        """Read a stored chunk straight into its place in the target, if it fills it whole.

        PyTorch's own reading makes two copies on the way.
        """
        info = self._reader.storage_data[item.storage_index]
        path = self.directory / info.relative_path
        part = target
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        with open(path, "rb") as file:
            stored = self._archives.stored(file, info.offset, info.length)
        whole = stored.shape == part.shape and stored.dtype == part.dtype
        if not (whole and stored.contiguous and part.is_contiguous()):
            return False
        read_into(path, info.offset + stored.start, part)
        return True
