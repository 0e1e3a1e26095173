"""Where Megatron is changed, beside cpu.py: each file says why, and what makes it needless."""

from collections.abc import Callable
from typing import Any

from megatron_infifpo.patches import adam, output_layer, startup, training_loop


def apply(get_schedule: Callable[..., Callable[..., list[Any]]]) -> None:
    """Mend Megatron for training, on any device; idempotent.

    Args:
        get_schedule: what the training loop is to call for the schedule of a step.
    """
    startup.skip_helpers()
    startup.skip_warm_up()
    output_layer.allow_fused_gradients()
    adam.make_resumable()
    training_loop.use_schedule(get_schedule)
