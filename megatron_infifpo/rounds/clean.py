"""Delete the weights of rounds that nothing needs any more."""

import shutil

from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.rounds.stages import RoundFolder


def remove_old(job: RoundsJob, number: int) -> None:
    """Delete weights of the rounds before the last `keep_rounds`, once round `number` is done.

    What stays: the imported pivot, and all that the next round begins with.
    """
    if job.keep_rounds is None:
        return
    for old in range(number - job.keep_rounds + 1):
        here = RoundFolder(job, old)
        shutil.rmtree(here.hf, ignore_errors=True)
        if not job.carried:
            shutil.rmtree(here.checkpoint, ignore_errors=True)
    last = (number - job.keep_rounds + 1) * job.steps
    if job.carried:
        for path in RoundFolder(job, 0).checkpoint.glob("iter_*"):
            step = path.name.removeprefix("iter_")
            if step.isdecimal() and int(step) <= last:
                shutil.rmtree(path, ignore_errors=True)
