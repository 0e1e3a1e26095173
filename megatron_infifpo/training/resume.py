"""Going on with a run: what must be as it was, and what may change if the user says so.

Steps, epochs and the schedule are counted in batches, so the batch stays. Another learning rate,
schedule, weight decay or number of steps is taken with `--override-opt-param-scheduler`, from the
next step on and with the optimizer's state; `--use-checkpoint-opt-param-scheduler` goes on by the
schedule of before, whatever the command line says.
"""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.training.rates import Schedule
from megatron_infifpo.training.resharding import changed
from megatron_infifpo.training.start import Start

LENGTH = ("train_iters", "train_samples", "lr_decay_iters", "lr_decay_samples")
SCHEDULE = (
    "lr",
    "min_lr",
    "decoupled_lr",
    "decoupled_min_lr",
    *LENGTH,
    "lr_decay_style",
    "lr_wsd_decay_style",
    "lr_wsd_decay_iters",
    "lr_wsd_decay_samples",
    "lr_warmup_fraction",
    "lr_warmup_iters",
    "lr_warmup_samples",
    "start_weight_decay",
    "end_weight_decay",
    "weight_decay_incr_style",
)
# Of these only the rest of a run can be changed, never what is done.
_ENDS = ("train_iters", "train_samples")
_WHICH = ("override", "use_checkpoint")  # the schedule of the flags, or that of the checkpoint


def check_batch(now: int, start: Start) -> None:
    """Refuse another batch size, in pairs, than that of the steps that are done.

    Raises:
        UserError: names both.
    """
    if not start.resumed:
        return
    before = start.saved.get("global_batch_size")
    if before not in (None, now):
        raise UserError(
            f"--global-batch-size is {now}, but the run in {start.folder} has {before} since its "
            f"first step: steps, epochs and the learning rate are counted in batches, at step "
            f"{start.step} after {start.samples} pairs. Resume with {before} (--micro-batch-size "
            "and the number of ranks are free), or begin a new run in another --save"
        )


def settled_schedule(
    run: Mapping[str, Any], start: Start, *, length_matters: bool = False
) -> dict[str, Any]:
    """Decide by which schedule a resumed run goes on.

    Args:
        run: its arguments, validated by Megatron.
        start: the checkpoint that it begins with.
        length_matters: whether the loss depends on how long the run is, as WRPO's does.

    Returns:
        The arguments that differ then, by name.

    Raises:
        UserError: the schedule is another one, and no flag says which to take.
    """
    override, by_checkpoint = (run[f"{which}_opt_param_scheduler"] for which in _WHICH)
    if override and by_checkpoint:
        raise UserError(
            "give one of --override-opt-param-scheduler (the schedule of the command line) and "
            "--use-checkpoint-opt-param-scheduler (that of the checkpoint)"
        )
    if not start.resumed:
        return {}
    if by_checkpoint:
        saved, names = with_decay(start.saved), (*SCHEDULE, "lr_warmup_init")
        return {name: saved[name] for name in names if name in saved and name not in _ENDS}
    found = schedule_changes(run, start)
    if not found:
        return {}
    only_longer = not length_matters and _only_longer(start.saved, run)
    if not override and not only_longer:
        raise UserError(
            f"{', '.join(found)} since the last checkpoint: pass --override-opt-param-scheduler to "
            "go on by the new schedule, with the optimizer's state; or "
            "--use-checkpoint-opt-param-scheduler to go on by the old one"
        )
    return {"override_opt_param_scheduler": True}


def schedule_changes(run: Mapping[str, Any], start: Start) -> list[str]:
    """Say what of a resumed run's schedule is another than it was."""
    if not start.resumed:
        return []
    saved = with_decay(start.saved)
    return changed([name for name in SCHEDULE if name in saved], saved, with_decay(run))


def _only_longer(saved: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether the rate and the decay of weights are what they were at every step of both runs."""
    rest = [name for name in SCHEDULE if name not in LENGTH]
    constant = run["lr_decay_style"] == run["weight_decay_incr_style"] == "constant"
    return constant and run["lr_warmup_fraction"] is None and not changed(rest, saved, run)


def with_decay(args: Mapping[str, Any]) -> dict[str, Any]:
    """Complete arguments as Megatron does once it trains: the rate decays until the end."""
    iters, samples = args.get("lr_decay_iters"), args.get("lr_decay_samples")
    return {
        **args,
        "lr_decay_iters": iters or args.get("train_iters"),
        "lr_decay_samples": samples or args.get("train_samples"),
    }


def schedule_identity(run: Mapping[str, Any]) -> dict[str, Any]:
    """The schedule for run.json: what is set of it."""
    completed = with_decay(run)
    return {name: completed[name] for name in SCHEDULE if completed.get(name) is not None}


def stop(step: int | None, run: Mapping[str, Any], *, evaluates: bool) -> dict[str, Any]:
    """Let a run end once so many of its steps are done.

    Args:
        step: to stop at; None: the last one.
        run: its arguments, with its length.
        evaluates: whether to evaluate there, as at the end.

    Returns:
        The arguments that do it, by name.

    Raises:
        UserError: it has fewer steps.
    """
    if step is None:
        return {}
    steps = run["train_iters"] or run["train_samples"] // run["global_batch_size"]
    if step > steps:
        raise UserError(
            f"--stop-at is {step}, but the run has {steps} steps by --train-iters (or "
            "--preference-epochs, --train-samples): expected one of them"
        )
    if step == steps:
        return {}
    # Megatron ends at multiples, and this is the first one after any step before it.
    return {"exit_interval": step} | ({"eval_interval": step} if evaluates else {})


def nothing_left(schedule: Schedule, start: Start, stop_at: int | None = None) -> str | None:
    """Say so if a resumed run has all of its steps; None if there are some left.

    Args:
        schedule: of the run.
        start: the checkpoint that it begins with.
        stop_at: the step that it is to stop at, if not at the last.
    """
    steps = schedule.steps if stop_at is None else stop_at
    if not start.resumed or start.step < steps:
        return None
    more = "--train-iters or --preference-epochs" if steps == schedule.steps else "--stop-at"
    return (
        f"nothing left to do: the run in {start.folder} is at step {start.step} and these flags "
        f"ask for {steps}; for more steps raise {more}"
    )
