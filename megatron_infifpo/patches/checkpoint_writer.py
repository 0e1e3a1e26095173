"""Megatron's process that writes a rank's checkpoints (`--use-persistent-ckpt-worker`), on a CPU.

For Megatron 0.19. The process is a new one that imports nothing of ours, and its first act is to
choose a GPU. Needless once Megatron runs on a device that its user names, as `cpu` is.
"""

from typing import Any

from megatron_infifpo.patches import cpu


def write_on_cpu() -> None:
    """Let that process have the CPU stand-ins, where this one has them; idempotent."""
    from megatron.core.dist_checkpointing.strategies import async_utils

    caller: Any = async_utils.PersistentAsyncCaller
    if cpu.is_enabled():
        caller.async_loop = staticmethod(_loop)


def _loop(*args: Any) -> None:
    """Run in the new process, which finds this function by its name."""
    cpu.enable(announce=False)
    from megatron.core.dist_checkpointing.strategies import async_utils

    async_utils.PersistentAsyncCaller.async_loop(*args)
