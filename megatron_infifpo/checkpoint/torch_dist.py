"""Megatron's torch_dist format, streamed: tensors are made when written, and read in slices.

The format is PyTorch's distributed checkpoint. Megatron's own writer holds the whole model in
memory and needs process groups; PyTorch's needs neither, and Megatron reads the result.
"""

import json
import math
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_infifpo.checkpoint.safetensors_io import Scratch, read_into
from megatron_infifpo.checkpoint.share import Share
from megatron_infifpo.cli import UserError


class LazyTensor:
    """A tensor whose chunks are made when they are written: `[L, ...]` of all layers in L chunks.

    It speaks DCP's protocol for objects that are not tensors.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        offsets: list[tuple[int, ...]],
        chunk: tuple[int, ...],
        dtype: torch.dtype,
        load: Callable[[tuple[int, ...]], Tensor],
    ):
        """Describe the tensor.

        Args:
            size: shape of the whole tensor.
            offsets: where its chunks begin.
            chunk: shape of every chunk.
            dtype: element type.
            load: returns the chunk at an offset.
        """
        self.whole = torch.Size(size)
        self.chunks = [
            ChunkStorageMetadata(torch.Size(offset), torch.Size(chunk)) for offset in offsets
        ]
        self.dtype = dtype
        self.load = load

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        """One write a chunk."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.whole),
            )
            for chunk in self.chunks
        ]

    def at(self, index: MetadataIndex) -> Tensor:
        """Make the data of one chunk."""
        assert index.offset is not None
        return self.load(tuple(index.offset))


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.at(index) if isinstance(value, LazyTensor) else value


class _SlicePlanner(dcp.DefaultLoadPlanner):
    """Puts whatever is read into one tensor."""

    def __init__(self, target: Tensor):
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.target


def write(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    extra_state_keys: Mapping[str, int],
    common_state: Mapping[str, Any],
    share: Share,
) -> None:
    """Write a checkpoint that Megatron loads; its `metadata.json`, written last, completes it.

    Args:
        directory: an existing, empty folder.
        tensors: this rank's chunks, by key.
        extra_state_keys: keys of empty objects, with their numbers of shards.
        common_state: `args`, `iteration` and so on: plain types only.
        share: the ranks that write together; the first one writes what is not tensors.
    """
    state: dict[str, Any] = {}
    if share.first:
        state["common_state/shard_0_1"] = [dict(common_state)]
        for key, shards in extra_state_keys.items():
            for shard in range(shards):
                state[f"{key}/shard_{shard}_{shards}"] = [None]
    state |= tensors
    writer = dcp.FileSystemWriter(directory, per_thread_copy_ahead=0)
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # Nobody reads the zip format's checksums, and they take longer than writing.
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(state, storage_writer=writer, planner=planner, no_dist=share.world == 1)
    except CheckpointException as error:
        # It wraps what happened on each rank.
        raise _cause(next(iter(error.failures.values()))[0]) from error
    finally:
        torch.serialization.set_crc32_options(checksums)
    if share.first:
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (directory / "metadata.json").write_text(json.dumps(config), encoding="utf-8")


def _cause(error: BaseException) -> BaseException:
    """Find the failed write behind an error: torch.save's zip writer covers it with its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    # What comes from another rank has lost its context.
    if cause is None and "inline_container" in str(error):
        cause = OSError("a rank could not write, as when the disk is full")
    return cause or error


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
_BROKEN_PICKLE = (
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
        self._reader = _Reader(directory)
        try:
            self._metadata = self._reader.read_metadata()
            self._metadata.state_dict_metadata.items()
            stored = (self._metadata.storage_data or {}).values()
            paths = sorted({str(info.relative_path) for info in stored})
        except _BROKEN_PICKLE as error:
            raise UserError(f"cannot read {directory}/.metadata: {error!r}") from error
        for path in paths:
            if Path(path).name != path:
                raise UserError(
                    f"{directory}/.metadata names {path!r}, expected files of that folder: it was "
                    "not written by Megatron"
                )
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    def names(self) -> Iterator[str]:
        """Keys of all model tensors."""
        for key, value in self._metadata.state_dict_metadata.items():
            model = key.startswith(("decoder.", "embedding.", "output_layer."))
            if model and isinstance(value, TensorStorageMetadata):
                yield key

    def has_object(self, key: str) -> bool:
        """Whether there is an object of this key, in any number of shards."""
        return any(name.startswith(f"{key}/") for name in self._metadata.state_dict_metadata)

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
            items = create_read_items_for_chunk_list(key, self._tensor(key), [chunk])
        except _BROKEN_PICKLE as error:
            raise UserError(f"{self.directory}/.metadata is broken at {key}: {error}") from error
        data = torch.empty(shape, dtype=dtype) if scratch is None else scratch.take(shape, dtype)
        if sum(math.prod(item.lengths) for item in items) != math.prod(shape):
            raise UserError(
                f"{self.directory} does not hold all of {key} at {list(offset)}: the checkpoint is "
                "incomplete or of another model"
            )
        try:
            if not all(self._read_directly(item, data) for item in items):
                self._reader.read_data(dcp.LoadPlan(items), _SlicePlanner(data)).wait()
        except _BROKEN_PICKLE as error:
            raise UserError(f"cannot read {key} from {self.directory}: {error}") from error
        return data

    def _read_directly(self, item: ReadItem, target: Tensor) -> bool:
        """Read a stored chunk straight into its place in the target, if it fills it whole.

        PyTorch's own reading makes two copies on the way.
        """
        info = self._reader.storage_data[item.storage_index]
        path = self.directory / info.relative_path
        part = target
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        with open(path, "rb") as file, FakeTensorMode():
            # Shape, strides and place of the data, without the data.
            stored = torch.load(self._reader._slice_file(file, info), weights_only=True)
        whole = stored.shape == part.shape and stored.dtype == part.dtype
        if not (whole and stored.is_contiguous() and part.is_contiguous()):
            return False
        start = stored.untyped_storage()._checkpoint_offset
        start += info.offset + stored.storage_offset() * stored.element_size()
        read_into(path, start, part)
        return True
