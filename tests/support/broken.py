"""Jobs on ranks to which something happens: killed, out of disk, robbed of their input, a NaN."""

import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import torch

from support.scoring import score
from support.tools import command
from support.training import train


def score_until_killed(argv: list[str], rank: int, point: str, seconds: float) -> None:
    """Score, but `kill -9` a rank so many seconds after the scoring, or the merge, has begun."""
    import megatron_infifpo.scoring.merge
    import megatron_infifpo.scoring.score

    merging: Any = megatron_infifpo.scoring.merge
    module: Any = megatron_infifpo.scoring.score

    def start() -> None:
        if int(os.environ["RANK"]) == rank:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    class Progress(module.Progress):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if point == "scoring":
                start()

    class LogprobWriter(merging.LogprobWriter):
        def __init__(self, *args, **kwargs):
            start()
            super().__init__(*args, **kwargs)

    module.Progress = Progress
    if point == "merging":
        merging.LogprobWriter = LogprobWriter
    score(argv)


def score_while_the_input_shrinks(argv: list[str], lines: int, moment: str) -> None:
    """Score, but shorten the records once they have been looked through, or scored."""
    import megatron_infifpo.scoring.score as module

    records = Path(argv[argv.index("--input") + 1])
    shorter = records.with_name(f"{os.environ['RANK']}.tmp")
    name = {"scoring": "prefetch", "merging": "merge"}[moment]
    original = getattr(module, name)

    def shrink(*args):
        whole = records.read_text()
        shorter.write_text("".join(whole.splitlines(keepends=True)[:lines]))
        shorter.replace(records)  # at once: another rank must not find it empty
        return original(*args)

    setattr(module, name, shrink)
    command("tools/score_source.py", argv)


def score_on_a_full_disk(argv: list[str], limit: int) -> None:
    """Score with files limited to so many bytes, which fails as a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    command("tools/score_source.py", argv)


def train_until_killed(
    argv: list[str], losses: str, rank: int, point: str, count: int, seconds: float
) -> None:
    """Train, but `kill -9` a rank so many seconds after its so-manieth step, or save, has begun.

    Appends a line `step loss` to the file `losses` after every step.
    """
    import megatron.training.training as loop
    from megatron.training import get_args

    left = [count]

    def begin(here: str) -> None:
        left[0] -= here == point
        if here == point and left[0] == 0 and int(os.environ["RANK"]) == rank:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    train_step, save = loop.train_step, loop.save_checkpoint

    def step_and_tell(*args, **kwargs):
        begin("step")
        result = train_step(*args, **kwargs)
        if result[0]:
            line = f"{get_args().curr_iteration + 1} {result[0]['loss'].item()!r}\n"
            with open(losses, "a", encoding="ascii") as file:
                file.write(line)
        return result

    def save_and_tell(*args, **kwargs):
        begin("save")
        return save(*args, **kwargs)

    loop.train_step, loop.save_checkpoint = step_and_tell, save_and_tell
    train(argv)


def train_on_a_full_disk(argv: list[str], limit: int) -> None:
    """Train with files limited to so many bytes, which fails as a full disk does."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    command("megatron_infifpo.train", argv)


def train_with_a_bad_step(argv: list[str], step: int, what: str) -> None:
    """Train, but make a weight of the pivot, or a gradient, NaN before that step."""
    import megatron.training.training as loop

    import megatron_infifpo.training.step as steps

    seen = [0]
    original, run_packed = loop.train_step, steps.run_packed

    def train_step(forward_step, data, model, *args, **kwargs):
        seen[0] += 1
        if seen[0] == step and what == "weight":
            with torch.no_grad():
                next(model[0].parameters())[0] = float("nan")
        return original(forward_step, data, model, *args, **kwargs)

    def spoiled(*args):
        output = run_packed(*args)
        if seen[0] == step and what == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output

    loop.train_step, steps.run_packed = train_step, spoiled
    command("megatron_infifpo.train", argv)
