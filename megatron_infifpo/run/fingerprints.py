"""What a stage is made of: its words, the content of its inputs, and the stages before it.

Two things are left out, since they change no result: where files lie, and how the work is divided
among ranks. Weights of models are read in part only: a stage that reads them compares all.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.run.stage import Stage

# Flags whose value, or presence, says how the work is divided.
_DIVISION = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size",
    "--expert-model-parallel-size", "--expert-tensor-parallel-size",
    "--num-virtual-stages-per-pipeline-rank", "--sequence-parallel", "--save-interval",
    "--recompute-granularity", "--recompute-method", "--recompute-num-layers",
    "--recompute-modules", "--overlap-grad-reduce", "--overlap-param-gather",
    "--optimizer-cpu-offload", "--optimizer-offload-fraction", "--log-interval",
    "--exit-signal-handler",
)  # fmt: skip
_WHOLE = 2**26  # bytes of a file that is read whole
_PIECE, _PIECES = 2**16, 64  # of a larger one
_PASSING = (".lock", "__pycache__")

Made = dict[str, Any]
"""words, inputs and before: what `made_of` returns, as it is kept."""


class Contents:
    """Hashes of files, each read once."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._known: dict[Path, str] = {}

    def of(self, path: str | Path) -> str:
        """Hash a file, or all files of a folder with their names.

        Raises:
            UserError: it is not there, or cannot be read.
        """
        path = Path(path).resolve()
        if path not in self._known:
            try:
                self._known[path] = _folder(path) if path.is_dir() else _file(path)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from None
        return self._known[path]


def _file(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= _WHOLE:
            found.update(file.read())
        else:
            for piece in range(_PIECES):
                file.seek((size - _PIECE) * piece // (_PIECES - 1))
                found.update(file.read(_PIECE))
    return found.hexdigest()


def _folder(path: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.endswith(_PASSING):
            found.update(f"{file.relative_to(path)} {_file(file)}\n".encode())
    return found.hexdigest()


def made_of(stage: Stage, output: Path, contents: Contents, before: Mapping[str, str]) -> Made:
    """Say what a stage is made of.

    Args:
        stage: of a run.
        output: folder of the run.
        contents: of files.
        before: what the stages before it are known by, by name.
    """
    return {
        "words": _meaning(stage, output),
        "inputs": {Path(name).name: contents.of(name) for name in stage.inputs},
        "before": {name: before[name] for name in stage.after},
    }


def key_of(made: Made) -> str:
    """What a stage is known by."""
    return hashlib.sha256(repr(sorted(made.items())).encode()).hexdigest()


def _meaning(stage: Stage, output: Path) -> list[str]:
    """The words of a stage, less what changes no result."""
    found: list[str] = []
    keep = True
    for word in stage.job.arguments:
        if word.startswith("--"):
            keep = word.partition("=")[0] not in _DIVISION
        if keep:
            found.append(_placeless(word, stage, output))
    return found


def _placeless(word: str, stage: Stage, output: Path) -> str:
    """A word without the folders that a path is in."""
    for path in stage.inputs:
        if word == path or word.endswith(f"={path}") or word.startswith(f"{path}="):
            return word.replace(path, Path(path).name)
    return word.replace(f"{output}/", "OUT/")


def difference(before: Made, now: Made) -> str | None:
    """Say how what a stage was made of differs from what it is made of now; None where nothing."""
    for name in sorted(before["inputs"].keys() | now["inputs"].keys()):
        if before["inputs"].get(name) != now["inputs"].get(name):
            return f"{name} is another one, or was changed"
    old, new = before["words"], now["words"]
    if old != new:
        gone = [word for word in old if word not in new]
        come = [word for word in new if word not in old]
        was, now_is = " ".join(gone) or "nothing", " ".join(come) or "nothing"
        return f"its command had {was}, and has {now_is} there now"
    for name in sorted(before["before"].keys() | now["before"].keys()):
        if before["before"].get(name) != now["before"].get(name):
            return f"{name}, which it reads, was made again"
    return None
