"""Count what a save needs, as one rank of a real run."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support.training import train


class LiveBytes(TorchDispatchMode):
    """Bytes of tensors that were made inside, alive at once: the most of it in `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_address(x) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor) and _address(tensor) not in given:
                size = tensor.untyped_storage().nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor, self._free, size)
        return result

    def _free(self, size: int) -> None:
        self.now -= size


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def save_bytes(argv: list[str]) -> dict[str, float]:
    """Train as `training.train` does, and count what its one save needs on this rank.

    Returns the rank's parameters, the peak of gathering optimizer state, and bytes written: what
    Megatron moves to the host when a GPU has it.
    """
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    found = {"parameters": 0.0, "gathered": 0.0, "written": 0.0}
    optimizer: Any = DistributedOptimizer
    writer: Any = filesystem_async.FileSystemWriterAsync
    gather, sharded, preload = (
        optimizer.get_parameter_state_dp_zero, optimizer.sharded_state_dict, writer.preload_tensors,
    )  # fmt: skip

    def counted_gather(self, *args, **kwargs):
        with LiveBytes() as live:
            state = gather(self, *args, **kwargs)
        found["gathered"] = max(found["gathered"], live.peak)
        return state

    def counted_parameters(self, *args, **kwargs):
        buffers = (buffer for buffers in self.per_model_buffers.values() for buffer in buffers)
        found["parameters"] = sum(buffer.numel_unpadded for buffer in buffers)
        return sharded(self, *args, **kwargs)

    def counted_preload(buckets, *args, **kwargs):
        for *_, (_, tensors) in buckets:
            found["written"] += sum(tensor.nbytes for _, tensor in tensors)
        return preload(buckets, *args, **kwargs)

    optimizer.get_parameter_state_dp_zero = counted_gather
    optimizer.sharded_state_dict = counted_parameters
    writer.preload_tensors = staticmethod(counted_preload)
    train([*argv, "--train-iters", "1", "--save-interval", "1"])
    return found


def saved_while_it_changes(folder: str) -> float:
    """Begin an asynchronous save of ones, change them before they are written; return what was."""
    import megatron.core.dist_checkpointing as checkpointing
    import torch.distributed as dist
    from megatron.core.dist_checkpointing import ShardedTensor

    from megatron_infifpo.patches.saves import mend_saves

    dist.init_process_group("gloo")
    mend_saves(lambda path, rank, world: None)
    values = torch.ones(16)

    def state(tensor: torch.Tensor) -> dict[str, ShardedTensor]:
        return {"values": ShardedTensor.from_rank_offsets("values", tensor)}

    request = checkpointing.save(
        state(values), folder, async_sharded_save=True, async_strategy="mcore"
    )
    values.zero_()
    request.execute_sync()
    return checkpointing.load(state(torch.empty(16)), folder)["values"].mean().item()
