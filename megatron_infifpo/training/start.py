"""What a run begins with: the checkpoint in its folders, or the weights of another."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.serialization import (
    load_common_state_dict,
    load_content_metadata,
)
from megatron.core.rerun_state_machine import RerunState
from torch.distributed.checkpoint.api import CheckpointException

from megatron_infifpo.convert.adapters import Adapters, holds_adapters
from megatron_infifpo.convert.fingerprint import Weights, read_weights
from megatron_infifpo.convert.hf_folder import check_weights, open_hf
from megatron_infifpo.convert.hf_weights import load_into_model
from megatron_infifpo.convert.megatron_folder import named_otherwise
from megatron_infifpo.engine.older import accept_older
from megatron_infifpo.errors import UserError
from megatron_infifpo.ranks import rank
from megatron_infifpo.storage.checkpoints import TRACKER, find_checkpoint
from megatron_infifpo.storage.checksums import verify_share
from megatron_infifpo.storage.torch_dist import BROKEN_PICKLE, TorchDistCheckpoint
from megatron_infifpo.training.folders import Folders, check_folders, is_hf_folder


@dataclass(frozen=True)
class Start:
    """What a run begins with: a checkpoint, or the weights of a Hugging Face folder.

    Attributes:
        folder: what Megatron calls --load, with the tracker and the folder `hf`; or the Hugging
            Face folder.
        tracker: what the tracker names, a number or `release`; that of a Hugging Face folder.
        files: the checkpoint's, in torch_dist; None of a Hugging Face folder.
        resumed: whether the run goes on with the checkpoint's step, or takes its weights alone.
        own: the folder of weights that Megatron cannot load, since they are no checkpoint of the
            whole model: a Hugging Face folder, a base with adapters, the base of a run's adapters.
    """

    folder: Path
    tracker: str
    files: TorchDistCheckpoint | None
    resumed: bool
    own: Path | None = None

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
        if self.own is None:
            return {"load": folders.loaded, "pretrained_checkpoint": folders.pretrained}
        return {"load": folders.loaded if self.resumed else None, "pretrained_checkpoint": None}

    def verify(self, rank: int, world: int) -> None:
        """Check this rank's share of the checkpoint's files by their checksums.

        Raises:
            UserError: a block is not what was written.
        """
        if self.files is not None:
            verify_share(self.files.checksums, rank, world)

    def fill(self, models: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook of Megatron's model builder: load what Megatron cannot, or let Megatron load.

        It comes before the chunks are wrapped: the optimizer makes its own parameters of theirs.

        Raises:
            UserError: weights that do not fit config.json.
        """
        if self.own is not None:
            load_into_model(models, self.own)
            return models
        return accept_older(self.checkpoint, models)

    @functools.cached_property
    def adapters(self) -> Adapters | None:
        """What the checkpoint's adapters are made for; None where it is whole.

        Raises:
            UserError: nothing beside it says so.
        """
        if self.files is None or not holds_adapters(self.files):
            return None
        return Adapters.read(self.folder)

    @functools.cached_property
    def weights(self) -> Weights:
        """What the weights in its folder are; with their base, where they are adapters.

        Raises:
            UserError: they cannot be read, or their base is another one.
        """
        return read_weights(self.folder)

    @functools.cached_property
    def own_weights(self) -> Weights:
        """What the weights are that Megatron cannot load; errors as `weights`."""
        assert self.own is not None
        return self.weights if self.own == self.folder else read_weights(self.own)

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


def find_start(folders: Folders, *, lora: bool = False) -> Start:
    """Find the checkpoint, or the Hugging Face folder, that a run begins with.

    Nothing in the checkpoint is unpickled before its metadata was looked through.

    Args:
        folders: that the run may read and write.
        lora: whether it trains adapters.

    Raises:
        UserError: a folder means two things, or is not there, or holds no checkpoint; a model that
            import would refuse; a run is to go on that trains something else.
    """
    check_folders(folders)
    folder = _pivot_directory(folders.loaded, folders.pretrained)
    if not (folder / TRACKER).is_file():
        weights, mapping, _ = open_hf(folder)
        if rank() == 0:
            check_weights(weights, mapping)
        return Start(folder, "release", None, resumed=False, own=folder)
    tracker = (folder / TRACKER).read_text(encoding="utf-8").strip()
    new = folders.finetune or tracker == "release"
    resumed = not new and (folders.pretrained is None or folder != Path(folders.pretrained))
    checkpoint = TorchDistCheckpoint(find_checkpoint(folder))
    if rank() == 0:
        checkpoint.check_sizes()
    ours = lora or holds_adapters(checkpoint) or named_otherwise(checkpoint, folder)
    own = folder if ours else None
    start = Start(folder, tracker, checkpoint, resumed, own)
    return _with_base(start, folders, lora) if resumed else start


def _with_base(start: Start, folders: Folders, lora: bool) -> Start:
    """Let a run of adapters go on with its base; others as they are.

    Raises:
        UserError: it was trained whole, and adapters are asked for, or the other way round.
    """
    before = start.adapters
    if before is None and lora:
        raise UserError(
            f"the run in {start.folder} trains the whole model: leave --lora-rank out to go on "
            "with it, or choose another --save to train adapters"
        )
    if before is None:
        return start
    if not lora:
        raise UserError(
            f"the run in {start.folder} trains adapters of rank {before.lora.rank}: give "
            f"--lora-rank {before.lora.rank} to go on with it, or choose another --save and give "
            "this folder to --pretrained-checkpoint to train the whole model"
        )
    base = before.base if folders.pretrained is None else Path(folders.pretrained)
    if not base.is_dir():
        raise UserError(
            f"the base of the adapters in {start.folder} is not in {base}: say with "
            "--pretrained-checkpoint where it is"
        )
    return replace(start, own=base)


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
    if pretrained is not None and is_hf_folder(Path(pretrained)):
        return Path(pretrained)
    raise UserError(
        f"no checkpoint in {' or '.join(map(str, candidates))}: give --pretrained-checkpoint the "
        "pivot's Hugging Face folder, with config.json, or what infifpo import made of it"
    )
