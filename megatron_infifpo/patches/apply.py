"""All that training changes of Megatron; `cpu` and `signals` are for some runs only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_infifpo.patches import (
    adam,
    checkpoint_writer,
    learning_rate,
    output_layer,
    saves,
    startup,
    training_loop,
)


def apply_patches(
    get_schedule: Callable[..., Callable[..., list[Any]]],
    finish_save: Callable[[Path, int, int], None],
) -> None:
    """Mend Megatron for training, on any device; idempotent.

    Args:
        get_schedule: what the training loop is to call for the schedule of a step.
        finish_save: what ends a save: see `saves.mend_saves`.
    """
    startup.skip_helpers()
    startup.skip_warm_up()
    startup.remember_failed_steps()
    output_layer.allow_fused_gradients()
    adam.make_resumable()
    learning_rate.take_new_rates()
    saves.mend_saves(finish_save)
    checkpoint_writer.write_on_cpu()
    training_loop.log_each_step_as_it_was()
    training_loop.use_schedule(get_schedule)
