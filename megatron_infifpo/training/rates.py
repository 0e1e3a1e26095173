"""Learning rates of a run's steps, known before it starts: none of them may be 0 by accident.

Megatron's warm-up begins with a step at rate 0, which moves nothing and counts its pairs as seen.
Here it begins one step higher, unless `--lr-warmup-init` says where.
"""

import math
import types
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_infifpo.engine.gpt import refusals
from megatron_infifpo.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Steps of a run and their learning rates.

    Attributes:
        batch: pairs of a step.
        steps: of the whole run.
        total: pairs of the whole run, as a growing option of a loss counts how much is done.
        decay: pairs until the rate has decayed, as Megatron counts them.
        warm_up: pairs until the rate is whole; a fraction may end inside a step.
        first: rate that the warm-up begins with: of W steps the first has 1/W of the whole one.
        peak: the whole rate; None where no flag gives it.
        lowest: where the rate ends.
        style: of the decay.
        annealing, annealing_style: pairs and style of the last part of WSD.
        by_checkpoint: whether the checkpoint's schedule goes before that of the flags.
    """

    batch: int
    steps: int
    total: int
    decay: int
    warm_up: float
    first: float
    peak: float | None
    lowest: float
    style: str
    annealing: int | None
    annealing_style: str
    by_checkpoint: bool

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Read it off Megatron's validated arguments, by name."""
        batch, iters = values["global_batch_size"], values["train_iters"]
        total = values["train_samples"] or iters * batch
        decay = values["lr_decay_samples"] or values["train_samples"]
        warm_up = values["lr_warmup_samples"]
        if iters:
            decay = (values["lr_decay_iters"] or iters) * batch
            warm_up = values["lr_warmup_iters"] * batch
        if values["lr_warmup_fraction"] is not None:
            warm_up = values["lr_warmup_fraction"] * decay
        first = values["lr_warmup_init"]
        peaks = [values[name] for name in ("lr", "decoupled_lr") if values[name] is not None]
        if peaks and warm_up > 0 and not first:
            first = min(peaks) / max(warm_up / batch, 1.0)
        annealing = values["lr_wsd_decay_samples"]
        if values["lr_wsd_decay_iters"] is not None:
            annealing = values["lr_wsd_decay_iters"] * batch
        return cls(
            batch=batch,
            steps=iters or total // batch,
            total=total,
            decay=decay,
            warm_up=warm_up,
            first=first,
            peak=values["lr"],
            lowest=values["min_lr"],
            style=values["lr_decay_style"],
            annealing=annealing,
            annealing_style=values["lr_wsd_decay_style"],
            by_checkpoint=values["use_checkpoint_opt_param_scheduler"],
        )


def rates(schedule: Schedule, start: int) -> list[float]:
    """Return the learning rate of every step from number `start` on, by Megatron's scheduler.

    Raises:
        UserError: the schedule contradicts itself.
    """
    batch, warm_up, decay = schedule.batch, schedule.warm_up, schedule.decay
    if warm_up >= decay:
        raise UserError(
            f"warm-up takes {warm_up / batch:g} steps, and the learning rate has decayed after "
            f"{decay / batch:g}: expected fewer steps of warm-up (--lr-warmup-iters, "
            "--lr-warmup-fraction)"
        )
    optimizer: Any = types.SimpleNamespace(param_groups=[])
    with refusals():
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=schedule.first,
            max_lr=schedule.peak,
            min_lr=schedule.lowest,
            lr_warmup_steps=warm_up,
            lr_decay_steps=decay,
            lr_decay_style=schedule.style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=1,
            wd_incr_style="constant",
            wsd_decay_steps=schedule.annealing,
            lr_wsd_decay_style=schedule.annealing_style,
        )
    found = []
    for step in range(start, schedule.steps):
        scheduler.num_steps = step * batch
        found.append(float(scheduler.get_lr({})))
    return found


def check_rates(schedule: Schedule, start: int, *, warn: bool = True) -> None:
    """Refuse a schedule with steps that move nothing; warn if the user asked for rate 0.

    Args:
        schedule: of the run.
        start: steps that are done.
        warn: whether this rank warns.

    Raises:
        UserError: says which steps, and what to change.
    """
    if schedule.peak is None:
        raise UserError("give --lr, the learning rate")
    for name, rate in (("--lr", schedule.peak), ("--min-lr", schedule.lowest)):
        if not math.isfinite(rate):
            raise UserError(f"{name} is {rate}, expected a finite number")
    if schedule.peak == 0:
        if warn:
            warnings.warn("--lr is 0: no step will move a weight", stacklevel=2)
        return
    idle = [start + i + 1 for i, rate in enumerate(rates(schedule, start)) if rate == 0]
    if idle:
        way = "raise --lr-decay-iters (or --lr-decay-samples), or give --min-lr"
        if schedule.by_checkpoint:
            way = (
                "the checkpoint's schedule ends there: take --override-opt-param-scheduler instead"
            )
        raise UserError(
            f"{len(idle)} steps, from step {idle[0]} on, would be at learning rate 0, which moves "
            f"nothing: the rate has decayed at step {schedule.decay // schedule.batch} of "
            f"{schedule.steps}; {way}"
        )
