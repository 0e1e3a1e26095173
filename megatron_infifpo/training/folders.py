"""The folders that a run may read and write."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.checkpoints import TRACKER


@dataclass(frozen=True)
class Folders:
    """What a run may read and write, as the flags name it.

    Attributes:
        save: where its checkpoints go, if anywhere.
        load: what it goes on from, where that is not `save`.
        pretrained: the pivot that a new run starts from.
        finetune: take the weights alone, whatever is loaded.
    """

    save: str | None
    load: str | None
    pretrained: str | None
    finetune: bool

    @classmethod
    def read(cls, flags: Mapping[str, Any]) -> Self:
        """Take them from a run's flags."""
        names = ("save", "load", "pretrained_checkpoint", "finetune")
        return cls(*(flags[name] for name in names))

    @property
    def loaded(self) -> str | None:
        """What Megatron is to load if there is a checkpoint: so one command starts and resumes."""
        return self.load or self.save


def is_hf_folder(directory: Path) -> bool:
    """Whether it is a Hugging Face folder."""
    return (directory / "config.json").is_file()


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder that cannot be made or written.

    Args:
        folder: absolute; it need not be there.
        what: the flag and what was given to it.

    Raises:
        UserError: something above it is a file, or may not be written to.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "may not be written to" if there.is_dir() else "is a file"
        raise UserError(f"{what} cannot be made or written: {there} {reason}")


def check_folders(folders: Folders) -> None:
    """Refuse folders that would be two things at once, and --load of nothing."""
    save, load, pretrained = (
        None if path is None else Path(path).resolve()
        for path in (folders.save, folders.load, folders.pretrained)
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
            f"--load {folders.load} has no checkpoint: it has no {TRACKER}. Mend the path; to "
            "start from a pivot give --pretrained-checkpoint, and leave --load out: a run is "
            "resumed from its --save"
        )
    if save is not None:
        check_writable(save, f"--save {folders.save}")
        if is_hf_folder(save):
            raise UserError(
                f"--save {folders.save} is a Hugging Face folder: give it to "
                "--pretrained-checkpoint, and another folder to --save"
            )
    if save is None or not (save / TRACKER).is_file():
        return
    if load is not None and load != save:
        raise UserError(
            f"--save {folders.save} holds a run already, which would be mixed with the one in "
            f"--load {folders.load}: leave --load out to go on with it, or choose another --save"
        )
    if folders.finetune:
        raise UserError(
            f"--finetune would start a new run in --save {folders.save}, which holds one: choose "
            "another --save, or leave --finetune out to go on"
        )
    if (save / TRACKER).read_text(encoding="utf-8").strip() == "release":
        raise UserError(
            f"--save {folders.save} is a converted pivot, and a run there would take its place: "
            "give it to --pretrained-checkpoint, and another folder to --save"
        )
