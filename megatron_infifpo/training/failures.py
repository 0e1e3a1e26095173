"""Say in a sentence what ended training, where Megatron says it in a traceback or a number."""

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

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.checkpoints import TRACKER
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.megatron_args import current_step
from megatron_infifpo.training.step import TrainingStep, way_on

_NOT_FINITE = (EXIT_CODE_RESUME_TO_DISAMBIGUATE, EXIT_CODE_FAILED_ON_RESULT_VALIDATION)


@contextlib.contextmanager
def explained(folders: Folders, step: TrainingStep, repeated: bool) -> Iterator[None]:
    """Run training inside.

    Args:
        folders: of the run.
        step: Megatron's forward step, which knows the records at hand.
        repeated: whether the run begins by repeating a step whose gradient was not finite.

    Raises:
        UserError: a checkpoint could not be written or read, or a gradient is not finite twice.
    """
    try:
        yield
    except CheckpointException as error:
        cause = (str(next(iter(error.failures.values()))[0]).splitlines() or ["unknown"])[-1]
        now = current_step()
        if folders.save is None or now is None:
            raise UserError(
                f"the checkpoint in {folders.loaded or folders.pretrained} could not be read "
                f"({cause}): take another one, or copy it again"
            ) from error
        tracker = Path(folders.save) / TRACKER
        good = f"step {tracker.read_text().strip()}" if tracker.is_file() else "none"
        free = shutil.disk_usage(folders.save).free / 1e9
        raise UserError(
            f"the checkpoint of step {now + 1} could not be written to "
            f"{folders.save} ({cause}), where {free:.1f} GB are free; the last good one is {good}: "
            "make room and run the command again, it goes on from there"
        ) from error
    except SystemExit as stop:
        # Megatron checks gradients, and exits so that the step can be repeated elsewhere.
        if stop.code not in _NOT_FINITE:
            raise
        now = current_step() or 0
        where = (
            f"at step {now}, in a batch with the records "
            f"{', '.join(map(repr, dict.fromkeys(step.record_ids())))} on this rank"
        )
        if repeated:
            raise UserError(
                f"a gradient was NaN or infinite {where}, and the step was repeated: Megatron's "
                "verdict is above. If it is not the node, it is the data or the weights: "
                f"{way_on(folders.save, now)}. If it is, go on elsewhere, with --rerun-mode "
                "disabled"
            ) from None
        print(
            f"error: a gradient is NaN or infinite {where}; run the command again, on another node "
            "if you can: if it happens again it is the data or the weights, else this node",
            file=sys.stderr,
            flush=True,
        )
        raise
