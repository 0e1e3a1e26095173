"""Let Megatron's training loop and its evaluation run their steps by a schedule of ours.

For Megatron 0.19. Needless once `pretrain` takes a schedule. It takes a communicator, but only with
process groups, and makes those itself.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import megatron.training.training as loop
from megatron.training import get_args

# Marks a log that is mended already, also inside of other wrappers.
_MENDED = "logs_each_step_as_it_was"


def use_schedule(get_schedule: Callable[..., Callable[..., list[Any]]]) -> None:
    """Put `get_schedule` in the place of Megatron's `get_forward_backward_func`."""
    module: Any = loop
    module.get_forward_backward_func = get_schedule


def log_each_step_as_it_was() -> None:
    """Log a step with its own learning rate, and begin the second line of a log anew; idempotent.

    Megatron asks for the rate after it has moved on to that of the next step, so the last step of a
    schedule is logged at 0. It keeps the sums of the first line for the next one: with
    `--log-interval 1`, or where a run is resumed at the end of an interval, the second line is then
    a mean over both. Needless once Megatron keeps them only for an interval that is not over, and
    asks for the rate first.
    """
    module: Any = loop
    log, step = module.training_log, module.train_step
    if hasattr(log, _MENDED):
        return
    signature = inspect.signature(log)
    rate: list[float | None] = [None]

    @functools.wraps(step)
    def noted(
        forward: Any, data: Any, model: Any, optimizer: Any, *others: Any, **more: Any
    ) -> Any:
        rate[0] = module.get_canonical_lr_for_logging(optimizer.param_groups)
        return step(forward, data, model, optimizer, *others, **more)

    @functools.wraps(log)
    def logged(*args: Any, **others: Any) -> Any:
        given = signature.bind(*args, **others)
        given.arguments["learning_rate"] = rate[0]
        if given.arguments["iteration"] % get_args().log_interval == 0:
            given.arguments["is_first_iteration"] = False
        return log(*given.args, **given.kwargs)

    setattr(logged, _MENDED, True)
    module.training_log, module.train_step = logged, noted


def save_nothing() -> None:
    """Without a folder for checkpoints, let the loop not save where it would in any case.

    It does before it exits at a signal, or for a gradient that is not finite, and fails. Needless
    once Megatron asks for `--save` there, as elsewhere.
    """
    module: Any = loop
    module.save_checkpoint_and_time = lambda *_, **__: None
