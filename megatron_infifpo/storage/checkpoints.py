"""Folders of checkpoints: where the weights are, what is carried along, and writing them whole."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import whole_folder
from megatron_infifpo.storage.beside import drop_code, without_code
from megatron_infifpo.storage.share import Share

TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"
NEMO_FOLDER = "weights"  # of NeMo 2's checkpoints, in a folder of their own
NEMO_PREFIX = "module."  # before the names of tensors in them
RUN_FILE = "run.json"  # what a training run was made of
# config.json's names of the dtypes that weights may have.
DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What a Hugging Face folder holds beside weights, and what users and licences need.
CARRIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*",
    "LICENSE*",
    "NOTICE*",
)


def find_checkpoint(directory: str | Path, iteration: int | None = None) -> Path:
    """Return the folder of the torch_dist files of a Megatron checkpoint.

    Args:
        directory: what Megatron calls --save or --load; an iteration's folder in it; or NeMo's.
        iteration: training iteration; default: what the tracker file names.

    Raises:
        UserError: not a checkpoint, no such iteration, an incomplete one, or another format.
    """
    directory = Path(directory)
    tracker = directory / TRACKER
    for folder in (directory, directory / NEMO_FOLDER):
        if (folder / ".metadata").is_file():
            if iteration is not None:
                raise UserError(f"--iteration has no effect: {folder} is a single checkpoint")
            return _complete(folder)
    if iteration is None:
        if not tracker.is_file():
            raise UserError(
                f"{directory} is not a Megatron checkpoint: it has no {TRACKER}; expected the "
                "--save folder of a training or of infifpo import"
            )
        latest = tracker.read_text(encoding="utf-8").strip()
    else:
        latest = str(iteration)
    if latest != "release" and not latest.isdecimal():
        raise UserError(f"{tracker} says {latest!r}, expected a number or `release`")
    path = directory / (latest if latest == "release" else f"iter_{int(latest):07d}")
    if not path.is_dir():
        there = sorted(p.name for p in directory.glob("iter_*")) or ["none"]
        raise UserError(f"{directory} has no {path.name}: its iterations are {', '.join(there)}")
    return _complete(path)


def _complete(path: Path) -> Path:
    """Return the folder if saving into it ended; Megatron writes metadata.json last."""
    for name in ("metadata.json", ".metadata"):
        if not (path / name).is_file():
            raise UserError(
                f"{path} has no {name}: it is incomplete or not in the torch_dist format; choose "
                "another iteration, or save with --ckpt-format torch_dist"
            )
    return path


def carry(source: Path, target: Path) -> None:
    """Copy what is not weights from one Hugging Face folder into another.

    Python files are not copied, and so what names them in configurations (`auto_map`) is left out:
    the families' own classes compute the same.
    """
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                shutil.copyfile(path, copy)
                if copy.suffix == ".json" and copy.name.endswith("config.json"):
                    drop_code(copy)


def original_dtype(config: dict[str, Any]) -> torch.dtype:
    """Return the dtype that a config.json declares (`torch_dtype` before transformers 5)."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPE_NAMES:
        raise UserError(
            f"config.json: dtype is {name!r}, expected one of {', '.join(DTYPE_NAMES)}: "
            "give --dtype"
        )
    return DTYPE_NAMES[name]


def write_config(path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Write a model's config.json, declaring a dtype; a file that says so already is left alone."""
    name = str(dtype).removeprefix("torch.")
    config = without_code(config)
    if config.get("dtype", config.get("torch_dtype")) != name:
        config = {k: v for k, v in config.items() if k != "torch_dtype"} | {"dtype": name}
    if json.loads(path.read_text(encoding="utf-8")) != config:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_free(save: str | Path, flag: str = "--save") -> None:
    """Raise UserError if `save` holds something already, or is where a disk is mounted.

    Args:
        save: what is to be written.
        flag: that names it on the command line.
    """
    save = Path(save)
    if os.path.ismount(save):
        raise UserError(
            f"{flag} {save} is a mount point, to which nothing can be renamed: choose a folder "
            "inside it"
        )
    if save.is_file() or (save.is_dir() and any(save.iterdir())):
        raise UserError(f"{flag} {save} exists and is not empty: choose another or remove it")


@contextlib.contextmanager
def new_folder(save: str | Path, share: Share, flag: str = "--save") -> Iterator[Path]:
    """Yield a folder beside `save`, which becomes `save` if the block succeeds, else is removed.

    All ranks enter and leave it together; `flag` names it on the command line.

    Raises:
        UserError: `save` holds something already, or it cannot be written.
    """
    save = Path(save).resolve()
    check_free(save, flag)
    try:
        with whole_folder(save, first=share.first, wait=share.wait) as aside:
            yield aside
    except OSError as error:
        raise UserError(f"cannot write {flag} {save}: {error}; nothing was left there") from error
