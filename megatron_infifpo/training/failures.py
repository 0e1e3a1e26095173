"""Say in a sentence what ended training, where Megatron says it in a traceback or a number."""

import argparse
import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
)
from torch.distributed.checkpoint.api import CheckpointException

from megatron_infifpo.checkpoint.layout import TRACKER
from megatron_infifpo.cli import UserError
from megatron_infifpo.training.step import TrainingStep

_NOT_FINITE = (EXIT_CODE_RESUME_TO_DISAMBIGUATE, EXIT_CODE_FAILED_ON_RESULT_VALIDATION)


@contextlib.contextmanager
def explained(args: argparse.Namespace, step: TrainingStep) -> Iterator[None]:
    """Run training inside.

    Raises:
        UserError: a checkpoint could not be written.
    """
    try:
        yield
    except CheckpointException as error:
        if args.save is None or not hasattr(args, "curr_iteration"):
            raise  # it was being read
        cause = (str(next(iter(error.failures.values()))[0]).splitlines() or ["unknown"])[-1]
        tracker = Path(args.save) / TRACKER
        good = f"step {tracker.read_text().strip()}" if tracker.is_file() else "none"
        free = shutil.disk_usage(args.save).free / 1e9
        raise UserError(
            f"the checkpoint of step {args.curr_iteration + 1} could not be written to "
            f"{args.save} ({cause}), where {free:.1f} GB are free; the last good one is {good}: "
            "make room and run the command again, it goes on from there"
        ) from error
    except SystemExit as stop:
        # Megatron checks gradients, and exits so that the step can be repeated elsewhere.
        if stop.code in _NOT_FINITE:
            print(
                f"error: a gradient is NaN or infinite at step {args.curr_iteration}, in a batch "
                f"with the records {', '.join(map(repr, step.record_ids()))} on this rank; run the "
                "command again: if it happens again it is the data or the weights, else this node",
                file=sys.stderr,
                flush=True,
            )
        raise
