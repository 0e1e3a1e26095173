"""What every save of a run needs beside Megatron's own: an end, and a copy of what it writes.

For Megatron 0.19. Its checksums (`--verify-integrity`) are made by one rank that reads all files,
and a checkpoint without them cannot be loaded with the flag: needless once it shares the work among
ranks. Its helper process writes tensors that are on the CPU (of an optimizer that is kept there, or
of a run on a CPU) out of the memory that the next step changes: needless once it copies them.
What was written goes through one more process that would import PyTorch to read it: needless once
that process is sent bytes.
"""

import functools
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing as checkpointing
import megatron.core.dist_checkpointing.strategies.filesystem_async as writing
import torch.distributed as dist


def mend_saves(finish_save: Callable[[Path, int, int], None]) -> None:
    """Let every save end with a function, and write what was there when it began; idempotent.

    Args:
        finish_save: takes the folder, this rank and the number of ranks; writes the checksums.
    """
    module: Any = checkpointing
    save = module.save
    if hasattr(save, "__wrapped__"):
        return

    @functools.wraps(save)
    def save_whole(state: Any, directory: Any, *args: Any, **options: Any) -> Any:
        request = save(state, directory, *args, **options)
        rank, world = dist.get_rank(), dist.get_world_size()
        finish = functools.partial(finish_save, Path(directory), rank, world)
        if request is None:
            finish()
            return None
        if request.preload_fn is not None:  # None on a rank that has nothing to write
            copy_from_cpu(request.preload_fn.args[0])
        request.finalize_fns.append(finish)
        return request

    module.save = save_whole
    writer: Any = writing
    writer.get_write_results_queue = queue_of_results


def copy_from_cpu(buckets: list[Any]) -> None:
    """Replace tensors on the CPU by copies, in place.

    Args:
        buckets: what an asynchronous save is about to write, by file: its path, its name, and items
            with their bytes and with their tensors. Tensors on a GPU are copied by Megatron.
    """
    for number, (path, name, (read, tensors)) in enumerate(buckets):
        own = [(item, t.clone() if t.device.type == "cpu" else t) for item, t in tensors]
        buckets[number] = (path, name, (read, own))


class Results:
    """A queue in a process of its own, which keeps bytes and so imports nothing."""

    def __init__(self, queue: Any) -> None:
        """Take the queue: of a manager, so that other processes can put into it."""
        self._queue = queue

    def put(self, result: Any) -> None:
        """Add what one process has written."""
        self._queue.put(pickle.dumps(result))

    def get_nowait(self) -> Any:
        """Take what was put first.

        Raises:
            queue.Empty: there is nothing.
        """
        return pickle.loads(self._queue.get_nowait())


def queue_of_results(mp_mode: str = "spawn") -> Any:
    """The one queue of this process's saves, as Megatron keeps it; made at the first of them."""
    writer: Any = writing
    if writer._results_queue is None:
        writer._results_queue = Results(multiprocessing.get_context(mp_mode).Manager().Queue())
    return writer._results_queue
