"""Training as one of several ranks, and what is recorded of it."""

import sys
from pathlib import Path
from typing import Any


def train(argv: list[str]) -> dict[str, Any]:
    """Run `python -m megatron_infifpo.train ARGV` as one rank, and record what it computed.

    Returns the metrics of every step (on the last pipeline stage), gradient norms, learning rates,
    evaluations.
    """
    import megatron.training.training as loop

    import megatron_infifpo.training.run as program

    record: dict[str, Any] = {"steps": [], "norms": [], "rates": [], "evaluations": []}
    original, evaluate = loop.train_step, loop.evaluate

    def train_step(*args, **kwargs):
        record["rates"].append(args[3].param_groups[0]["lr"])
        result = original(*args, **kwargs)
        record["steps"].append({k: v.item() for k, v in result[0].items()})
        record["norms"].append(float(result[5]))
        return result

    def evaluate_and_record(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        record["evaluations"].append({k: float(v) for k, v in result[0].items()})
        return result

    loop.train_step, loop.evaluate = train_step, evaluate_and_record
    sys.argv = ["train", *argv]
    try:
        program.train(program.RunConfig.from_arguments(argv))
    except SystemExit as stop:  # Megatron's --exit-interval
        if stop.code:
            raise
    return record


def train_in_rounds(argv: list[str], steps: int) -> dict[str, Any]:
    """Train as `train` does, with a plan of the data that begins again after so many steps."""
    import megatron_infifpo.rows.loaders as loaders

    plan = loaders.plan_step
    loaders.plan_step = lambda *args, step, **rest: plan(*args, step=step % steps, **rest)
    return train(argv)


def counted_places() -> dict[str, dict[str, int]]:
    """Count from now on waits for the host by place, in steps and in writing the log line.

    Returns what is counted: train_step and training_log; and reductions over ranks, by who asks.
    """
    import collections

    import megatron.training.training as loop
    import torch.distributed as dist

    from megatron_infifpo.gpu_check.host_waits import counted

    found: dict[str, collections.Counter[str]] = {}
    for name in ("train_step", "training_log"):
        found[name] = collections.Counter()
        setattr(loop, name, counted(found[name], getattr(loop, name)))
    found["reductions"] = collections.Counter()
    all_reduce = dist.all_reduce

    def noted(*args: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_code
        found["reductions"][f"{Path(caller.co_filename).stem}.{caller.co_name}"] += 1
        return all_reduce(*args, **options)

    dist.all_reduce = noted
    return found  # type: ignore[return-value]


def kept_bytes(argv: list[str]) -> dict[str, float]:
    """Train one step, and count what the layers' forward pass keeps for the backward pass.

    Returns bytes of the largest row's saved tensors, parameters left out, and that row's tokens.
    """
    import megatron_infifpo.training.run  # noqa: F401  (readies Megatron for the CPU)
    import megatron_infifpo.training.step as step
    from megatron_infifpo.bench.jobs import KeptBytes

    found: dict[str, float] = {"tokens": 0.0}
    original = step.run_packed

    def run_packed(model, row, vocab_size):
        with KeptBytes(model) as kept:
            output = original(model, row, vocab_size)
        if row["tokens"].numel() > found["tokens"]:
            found.update(tokens=row["tokens"].numel(), kept=kept.bytes)
            found["keys"] = row["key_rows"].numel() if "key_rows" in row else found["tokens"]
        return output

    step.run_packed = run_packed
    train([*argv, "--train-iters", "1"])
    return found
