"""What a run begins with: the folders that it may read and write, and the checkpoint in them."""

import argparse
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.serialization import (
    load_common_state_dict,
    load_content_metadata,
)
from megatron.core.rerun_state_machine import RerunState
from torch.distributed.checkpoint.api import CheckpointException

from megatron_infifpo.errors import UserError
from megatron_infifpo.families.architecture import pivot_directory
from megatron_infifpo.storage.checkpoints import TRACKER, find_checkpoint
from megatron_infifpo.storage.torch_dist import BROKEN_PICKLE, TorchDistCheckpoint


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run begins with.

    Attributes:
        folder: what Megatron calls --load; it has the tracker and the folder `hf`.
        tracker: what the tracker names, a number or `release`.
        checkpoint: its torch_dist files.
        resumed: whether the run goes on with the checkpoint's step, or takes its weights alone.
    """

    folder: Path
    tracker: str
    checkpoint: TorchDistCheckpoint
    resumed: bool

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """What Megatron saved beside tensors; plain types.

        Raises:
            UserError: it cannot be read.
        """
        directory = self.checkpoint.directory
        try:
            state: dict[str, Any] = load_common_state_dict(directory)
            vars(state["args"])
        except (CheckpointException, *BROKEN_PICKLE) as error:
            reason = " ".join(repr(error).split())[-300:]
            raise UserError(
                f"cannot read the arguments that {directory} holds: {reason}"
            ) from error
        return state

    @property
    def saved(self) -> dict[str, Any]:
        """Megatron's arguments of the run that saved the checkpoint."""
        return vars(self.state["args"])

    @property
    def sharding(self) -> str | None:
        """How the distributed optimizer was saved, None where there was none."""
        metadata = load_content_metadata(preloaded_state_dict=self.state) or {}
        return metadata.get("distrib_optim_sharding_type")

    @property
    def step(self) -> int:
        """Steps that are done: 0 of a new run."""
        return int(self.state["iteration"]) if self.resumed else 0

    @property
    def repeats(self) -> bool:
        """Whether its next step has failed Megatron's checks before, and is to be repeated."""
        machine = (self.state if self.resumed else {}).get("rerun_state_machine") or {}
        return machine.get("state", RerunState.NOT_RUNNING_YET) != RerunState.NOT_RUNNING_YET

    @property
    def samples(self) -> int:
        """Pairs that those steps have seen."""
        return int(self.saved["consumed_train_samples"]) if self.resumed else 0


def find_start(args: argparse.Namespace) -> Start:
    """Find the checkpoint that a run begins with; sets `args.load` to `--save` by default.

    Nothing in the checkpoint is unpickled before its metadata was looked through.

    Raises:
        UserError: a folder means two things, or is not there, or holds no checkpoint.
    """
    _check_folders(args)
    args.load = args.load or args.save
    folder = pivot_directory(args.load, args.pretrained_checkpoint)
    tracker = (folder / TRACKER).read_text(encoding="utf-8").strip()
    resumed = not args.finetune and tracker != "release" and folder != _path(args, "pretrained")
    checkpoint = TorchDistCheckpoint(find_checkpoint(folder))
    if args.rank == 0:
        checkpoint.check_sizes()
    return Start(folder, tracker, checkpoint, resumed)


def _path(args: argparse.Namespace, name: str) -> Path | None:
    value = args.pretrained_checkpoint if name == "pretrained" else getattr(args, name)
    return None if value is None else Path(value)


def _check_folders(args: argparse.Namespace) -> None:
    """Refuse folders that would be two things at once, and --load of nothing."""
    save, load, pretrained = (
        None if path is None else path.resolve()
        for path in (_path(args, name) for name in ("save", "load", "pretrained"))
    )
    if pretrained is not None and pretrained in (save, load):
        flag = "--save" if pretrained == save else "--load"
        raise UserError(
            f"{flag} and --pretrained-checkpoint are both {pretrained}: give the folder to --save "
            "alone to go on with the run in it, or --pretrained-checkpoint with another --save to "
            "start a new run from its weights"
        )
    if load is not None and load != save and not (load / TRACKER).is_file():
        raise UserError(
            f"--load {args.load} has no checkpoint: it has no {TRACKER}. Mend the path; to start "
            "from a converted pivot give --pretrained-checkpoint, and leave --load out: a run is "
            "resumed from its --save"
        )
    if save is not None:
        there = next(path for path in (save, *save.parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            what = "may not be written to" if there.is_dir() else "is a file"
            raise UserError(f"--save {args.save} cannot be made or written: {there} {what}")
    if save is None or not (save / TRACKER).is_file():
        return
    if load is not None and load != save:
        raise UserError(
            f"--save {args.save} holds a run already, which would be mixed with the one in --load "
            f"{args.load}: leave --load out to go on with it, or choose another --save"
        )
    if args.finetune:
        raise UserError(
            f"--finetune would start a new run in --save {args.save}, which holds one: choose "
            "another --save, or leave --finetune out to go on"
        )
    if (save / TRACKER).read_text(encoding="utf-8").strip() == "release":
        raise UserError(
            f"--save {args.save} is a converted pivot, and a run there would take its place: give "
            "it to --pretrained-checkpoint, and another folder to --save"
        )
