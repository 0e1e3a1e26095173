"""Megatron's torch_dist format, streamed: tensors are made when they are written.

The format is PyTorch's distributed checkpoint. Megatron's own writer holds the whole model in
memory and needs process groups; PyTorch's needs neither, and Megatron reads the result.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from megatron_infifpo.storage.checksums import write_checksums
from megatron_infifpo.storage.share import Share


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
    write_checksums(directory, share.rank, share.world)


def _cause(error: BaseException) -> BaseException:
    """Find the failed write behind an error: torch.save's zip writer covers it with its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    # What comes from another rank has lost its context.
    if cause is None and "inline_container" in str(error):
        cause = OSError("a rank could not write, as when the disk is full")
    return cause or error
