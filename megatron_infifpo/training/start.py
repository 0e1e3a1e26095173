"""What a run begins with: the folders that it may read and write, and the checkpoint in them."""

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from megatron.core.dist_checkpointing.serialization import (
    load_common_state_dict,
    load_content_metadata,
)
from megatron.core.rerun_state_machine import RerunState
from torch.distributed.checkpoint.api import CheckpointException

from megatron_infifpo.convert.hf_folder import check_weights, open_hf
from megatron_infifpo.convert.hf_weights import load_into_model
from megatron_infifpo.engine.older import accept_older
from megatron_infifpo.errors import UserError
from megatron_infifpo.ranks import rank
from megatron_infifpo.storage.checkpoints import TRACKER, find_checkpoint
from megatron_infifpo.storage.checksums import verify_share
from megatron_infifpo.storage.torch_dist import BROKEN_PICKLE, TorchDistCheckpoint


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


@dataclass(frozen=True)
class Start:
    """What a run begins with: a checkpoint, or the weights of a Hugging Face folder.

    Attributes:
        folder: what Megatron calls --load, with the tracker and the folder `hf`; or the Hugging
            Face folder.
        tracker: what the tracker names, a number or `release`; that of a Hugging Face folder.
        files: the checkpoint's, in torch_dist; None of a Hugging Face folder.
        resumed: whether the run goes on with the checkpoint's step, or takes its weights alone.
    """

    folder: Path
    tracker: str
    files: TorchDistCheckpoint | None
    resumed: bool

    @property
    def is_hf(self) -> bool:
        """Whether it is a Hugging Face folder: then Megatron itself has nothing to load."""
        return self.files is None

    @property
    def checkpoint(self) -> TorchDistCheckpoint:
        """The checkpoint's files; nobody asks a Hugging Face folder."""
        assert self.files is not None, f"{self.folder} is a Hugging Face folder"
        return self.files

    @property
    def how_to_sample(self) -> str:
        """How to get samples of it, for a sentence about others."""
        if self.is_hf:
            return f"sample with {self.folder}"
        return f"export {self.folder} and sample with it"

    def loaded_by_megatron(self, folders: Folders) -> dict[str, str | None]:
        """Megatron's arguments that say what it loads."""
        if self.is_hf:
            return {"load": None, "pretrained_checkpoint": None}
        return {"load": folders.loaded, "pretrained_checkpoint": folders.pretrained}

    def verify(self, rank: int, world: int) -> None:
        """Check this rank's share of the checkpoint's files by their checksums.

        Raises:
            UserError: a block is not what was written.
        """
        if self.files is not None:
            verify_share(self.files.checksums, rank, world)

    def fill(self, models: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook of Megatron's model builder: load a Hugging Face folder, or let Megatron load.

        It comes before the chunks are wrapped: the optimizer makes its own parameters of theirs.

        Raises:
            UserError: weights that do not fit config.json.
        """
        if self.files is None:
            load_into_model(models, self.folder)
            return models
        return accept_older(self.files, models)

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


def find_start(folders: Folders) -> Start:
    """Find the checkpoint, or the Hugging Face folder, that a run begins with.

    Nothing in the checkpoint is unpickled before its metadata was looked through.

    Raises:
        UserError: a folder means two things, or is not there, or holds no checkpoint; a model that
            import would refuse.
    """
    _check_folders(folders)
    folder = _pivot_directory(folders.loaded, folders.pretrained)
    if not (folder / TRACKER).is_file():
        weights, mapping, _ = open_hf(folder)
        if rank() == 0:
            check_weights(weights, mapping)
        return Start(folder, "release", None, resumed=False)
    tracker = (folder / TRACKER).read_text(encoding="utf-8").strip()
    new = folders.finetune or tracker == "release"
    resumed = not new and (folders.pretrained is None or folder != Path(folders.pretrained))
    checkpoint = TorchDistCheckpoint(find_checkpoint(folder))
    if rank() == 0:
        checkpoint.check_sizes()
    return Start(folder, tracker, checkpoint, resumed)


def _pivot_directory(load: str | None, pretrained: str | None) -> Path:
    """Return what carries the pivot's architecture: the run's own checkpoint once it exists.

    Raises:
        UserError: there is none.
    """
    candidates = [Path(directory) for directory in (load, pretrained) if directory is not None]
    if not candidates:
        raise UserError(
            "no pivot: give --pretrained-checkpoint DIR, a Hugging Face folder or a checkpoint"
        )
    for directory in candidates:
        if (directory / TRACKER).is_file():
            return directory
    if pretrained is not None and _is_hf(Path(pretrained)):
        return Path(pretrained)
    raise UserError(
        f"no checkpoint in {' or '.join(map(str, candidates))}: give --pretrained-checkpoint the "
        "pivot's Hugging Face folder, with config.json, or what infifpo import made of it"
    )


def _is_hf(directory: Path) -> bool:
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


def _check_folders(folders: Folders) -> None:
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
        if _is_hf(save):
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
