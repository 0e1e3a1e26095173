"""Delete the weights of rounds that nothing needs any more."""

import shutil

from megatron_infifpo.rounds.job import RoundsJob
from megatron_infifpo.rounds.stages import RoundFolder


def remove_old(job: RoundsJob, number: int) -> None:
    """Delete weights of the rounds before the last `keep_rounds`, once round `number` is done.

    What stays: the imported pivot, all that the next round begins with, and what a run says of
    itself beside its weights.
    """
    if job.keep_rounds is None:
        return
    for old in range(number - job.keep_rounds + 1):
        here = RoundFolder(job, old)
        shutil.rmtree(here.hf, ignore_errors=True)
        for path in here.checkpoint.glob("iter_*"):
            step = path.name.removeprefix("iter_")
            if step.isdecimal() and (not job.carried or int(step) <= (old + 1) * job.steps):
                shutil.rmtree(path, ignore_errors=True)
