"""Let helper processes survive the signal at which training saves and exits.

For Megatron 0.19. SLURM signals every process of a step, and Megatron's checkpoint writer has
helpers of its own, which the signal would end just when they are needed. Needless once they block
it themselves.
"""

import functools
import multiprocessing.process
import signal
from multiprocessing import resource_tracker


def shield_helpers(number: signal.Signals) -> None:
    """Start every helper process from now on with this signal blocked; idempotent."""
    process = multiprocessing.process.BaseProcess
    original = process.start
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def start(self: multiprocessing.process.BaseProcess) -> None:
        resource_tracker.ensure_running()  # which unblocks SIGTERM when it starts
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        try:
            original(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    process.start = start  # type: ignore[method-assign]
