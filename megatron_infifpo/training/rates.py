"""Learning rates of a run's steps, known before it starts: none of them may be 0 by accident.

Megatron's warm-up begins with a step at rate 0, which moves nothing and counts its pairs as seen.
Here it begins one step higher, unless `--lr-warmup-init` says where.
"""

import argparse
import types
import warnings
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_infifpo.engine.gpt import refusals
from megatron_infifpo.errors import UserError


def complete_warm_up(args: argparse.Namespace) -> None:
    """Let the first step of a warm-up of W steps have 1/W of the rate.

    Args:
        args: of the run, validated by Megatron.
    """
    steps = warm_up_samples(args) / args.global_batch_size
    if steps > 0 and not args.lr_warmup_init:
        rates = [rate for rate in (args.lr, args.decoupled_lr) if rate is not None]
        args.lr_warmup_init = min(rates) / max(steps, 1.0)


def decay_samples(args: argparse.Namespace) -> int:
    """Pairs until the rate has decayed, as Megatron counts them."""
    if args.train_iters:
        return (args.lr_decay_iters or args.train_iters) * args.global_batch_size
    return args.lr_decay_samples or args.train_samples


def warm_up_samples(args: argparse.Namespace) -> float:
    """Pairs until the rate is whole, as Megatron counts them; a fraction may end inside a step."""
    if args.lr_warmup_fraction is not None:
        return args.lr_warmup_fraction * decay_samples(args)
    if args.train_iters:
        return args.lr_warmup_iters * args.global_batch_size
    return args.lr_warmup_samples


def last_step(args: argparse.Namespace) -> int:
    """Return the number of steps of the whole run."""
    return args.train_iters or args.train_samples // args.global_batch_size


def rates(args: argparse.Namespace, first: int) -> list[float]:
    """Return the learning rate of every step from number `first` on, by Megatron's scheduler.

    Raises:
        UserError: the schedule contradicts itself.
    """
    decay, warm_up = decay_samples(args), warm_up_samples(args)
    if warm_up >= decay:
        raise UserError(
            f"warm-up takes {warm_up / args.global_batch_size:g} steps, and the learning rate has "
            f"decayed after {decay / args.global_batch_size:g}: expected fewer steps of warm-up "
            "(--lr-warmup-iters, --lr-warmup-fraction)"
        )
    annealing = args.lr_wsd_decay_samples
    if args.lr_wsd_decay_iters is not None:
        annealing = args.lr_wsd_decay_iters * args.global_batch_size
    optimizer: Any = types.SimpleNamespace(param_groups=[])
    with refusals():
        scheduler = OptimizerParamScheduler(
            optimizer,
            init_lr=args.lr_warmup_init,
            max_lr=args.lr,
            min_lr=args.min_lr,
            lr_warmup_steps=warm_up,
            lr_decay_steps=decay,
            lr_decay_style=args.lr_decay_style,
            start_wd=0.0,
            end_wd=0.0,
            wd_incr_steps=1,
            wd_incr_style="constant",
            wsd_decay_steps=annealing,
            lr_wsd_decay_style=args.lr_wsd_decay_style,
        )
    found = []
    for step in range(first, last_step(args)):
        scheduler.num_steps = step * args.global_batch_size
        found.append(float(scheduler.get_lr({})))
    return found


def check_rates(args: argparse.Namespace, first: int) -> None:
    """Refuse a schedule with steps that move nothing; warn if the user asked for rate 0.

    Args:
        args: of the run, validated by Megatron.
        first: steps that are done.

    Raises:
        UserError: says which steps, and what to change.
    """
    if args.lr is None:
        raise UserError("give --lr, the learning rate")
    if args.lr == 0:
        if args.rank == 0:
            warnings.warn("--lr is 0: no step will move a weight", stacklevel=2)
        return
    idle = [first + i + 1 for i, rate in enumerate(rates(args, first)) if rate == 0]
    if idle:
        way = "raise --lr-decay-iters (or --lr-decay-samples), or give --min-lr"
        if args.use_checkpoint_opt_param_scheduler:
            way = (
                "the checkpoint's schedule ends there: take --override-opt-param-scheduler instead"
            )
        raise UserError(
            f"{len(idle)} steps, from step {idle[0]} on, would be at learning rate 0, which moves "
            f"nothing: the rate has decayed at step "
            f"{decay_samples(args) // args.global_batch_size} of {last_step(args)}; {way}"
        )
