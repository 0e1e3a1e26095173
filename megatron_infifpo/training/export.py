"""Write the Hugging Face folder of a run that has all of its steps: `--export`."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_infifpo.convert.hf_export import RUN_COPY, export_checkpoint
from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.checkpoints import TRACKER, check_free
from megatron_infifpo.storage.share import Share
from megatron_infifpo.training.folders import check_writable
from megatron_infifpo.training.provenance import read_run
from megatron_infifpo.training.settings import Run

# The first rank may write for longer than ranks wait for each other in training.
_PATIENCE = datetime.timedelta(days=1)


def check_export(run: Run, *, finished: bool) -> None:
    """Refuse an `--export` that has no effect or could not be written at the end.

    Args:
        run: that is about to start.
        finished: whether no step is left to be done; then it may have been exported.

    Raises:
        UserError: says what is in the way.
    """
    export, save = run.config.export, run.folders.save
    if export is None:
        return
    if save is None:
        raise UserError("--export has no effect without --save: it is made of the last checkpoint")
    if run.conduct.skip_train:
        raise UserError("--export has no effect with --skip-train, which trains nothing")
    there, checkpoints = Path(export).resolve(), Path(save).resolve()
    if there in (checkpoints, *checkpoints.parents) or checkpoints in there.parents:
        raise UserError(
            f"--export {export} and --save {save} lie in each other: give --export a folder beside "
            "that of the checkpoints"
        )
    if not (finished and _is_exported(save, export)):
        check_free(export, "--export")
        check_writable(there, f"--export {export}")


def _is_exported(save: str, export: str) -> bool:
    """Whether a folder was exported after the last attempt at the run had begun."""
    found = read_run(Path(export), RUN_COPY)
    return found is not None and found == read_run(Path(save))


@contextlib.contextmanager
def exported_at_end(run: Run) -> Iterator[None]:
    """Train inside, and export once all steps are done; all ranks.

    Megatron leaves by `SystemExit` where it was told to stop, which may be at the last step.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        yield
    except SystemExit as stop:
        if not stop.code:
            export_finished(run)
        raise
    export_finished(run)


def export_finished(run: Run) -> None:
    """Export the last checkpoint if the run has all of its steps; all ranks, after the last save.

    Raises:
        UserError: the folder cannot be written.
    """
    if run.config.export is None:
        return
    others = None
    if run.layout.world_size > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        others = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        if run.layout.rank == 0:
            print(_export(run, run.config.export), flush=True)
    finally:
        if others is not None:  # a launcher may end a job soon after its first rank has ended
            dist.barrier(others)


def _export(run: Run, export: str) -> str:
    """Export, on the first rank alone; return what became of it."""
    save, steps = run.folders.save, run.schedule.steps
    assert save is not None
    tracker = Path(save) / TRACKER
    step = int(tracker.read_text(encoding="utf-8")) if tracker.is_file() else 0
    if step < steps:
        return (
            f"--export {export} is not written: the last checkpoint in {save} is of step {step} of "
            f"{steps}. The same command goes on, and exports at the end"
        )
    if _is_exported(save, export):
        return f"--export {export} is there already"
    export_checkpoint(save, export, share=Share(alone=True), flag="--export")
    return f"exported step {step} of {save} to {export}"
