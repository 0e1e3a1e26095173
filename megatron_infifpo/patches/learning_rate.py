"""Resume with another learning rate, and with a fresh optimizer at the right place of the schedule.

Megatron 0.19 looks for the saved state of a group of parameters by the group's learning rates,
among others, so that a run with other rates finds none; and where it finds one, it goes on by the
saved rates. Here a saved group takes the rates of the group that it belongs to: the same, unless
the user changed them.

With `--no-load-optim` Megatron begins the schedule anew, warm-up included, in the middle of a run.

Needless once `--override-opt-param-scheduler` overrides the rates of groups, too, and once the
schedule is loaded without the optimizer.
"""

import functools
from typing import Any

import megatron.core.optimizer.optimizer as optimizers
import megatron.training.training as loop
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_RATES = ("max_lr", "min_lr")
_REST = (
    *(key for key in optimizers.param_group_identifier_keys if key not in _RATES),
    "default_config",  # false where a flag gives the group a rate of its own
)


def take_new_rates() -> None:
    """Let every kind of optimizer load groups at the rates of the command line; idempotent."""
    kinds: tuple[Any, ...] = (
        DistributedOptimizer, optimizers.Float16OptimizerWithFloat16Params,
        optimizers.FP32Optimizer,
    )  # fmt: skip
    for kind in kinds:
        if not hasattr(kind, "takes_new_rates"):
            kind.load_state_dict = _with_new_rates(kind.load_state_dict)
            kind.takes_new_rates = True


def _with_new_rates(load_state_dict: Any) -> Any:
    @functools.wraps(load_state_dict)
    def load(self: Any, state: dict[str, Any]) -> None:
        adopt(state.get("optimizer", state).get("param_groups", []), self.optimizer.param_groups)
        load_state_dict(self, state)

    return load


def adopt(saved: list[dict[str, Any]], current: list[dict[str, Any]]) -> None:
    """Give saved groups of parameters the rates of the current ones that they belong to."""
    groups = {_identity(group): group for group in current}
    for group in saved:
        mine = groups.get(_identity(group))
        if mine is not None:
            group.update({name: mine[name] for name in _RATES if name in mine})


def _identity(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in _REST)


def start_schedule_at(samples: int) -> None:
    """Let the schedule begin after so many pairs, where none is loaded."""
    module: Any = loop
    build = module.get_optimizer_param_scheduler

    @functools.wraps(build)
    def moved(optimizer: Any) -> Any:
        scheduler = build(optimizer)
        scheduler.step(samples)
        return scheduler

    module.get_optimizer_param_scheduler = moved
