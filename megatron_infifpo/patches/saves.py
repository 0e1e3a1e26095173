"""Write the checksums of a checkpoint as soon as it is whole, before the tracker names it.

Megatron's own (`--verify-integrity`) are made by one rank that reads all files, and a checkpoint
without them cannot be loaded with the flag. Needless once it shares the work among ranks.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron.core.dist_checkpointing as checkpointing
import torch.distributed as dist


def end_with(finish_save: Callable[[Path, int, int], None]) -> None:
    """Let every save of a run end with a function, asynchronous ones included; idempotent.

    Args:
        finish_save: takes the folder, this rank and the number of ranks; writes the checksums.
    """
    module: Any = checkpointing
    save = module.save
    if hasattr(save, "__wrapped__"):
        return

    @functools.wraps(save)
    def save_and_sum(state: Any, directory: Any, *args: Any, **options: Any) -> Any:
        request = save(state, directory, *args, **options)
        rank, world = dist.get_rank(), dist.get_world_size()
        finish = functools.partial(finish_save, Path(directory), rank, world)
        if request is None:
            finish()
        else:
            request.finalize_fns.append(finish)
        return request

    module.save = save_and_sum
