"""Write aside, flush to the disk, rename: what has its name is whole, whatever stops a program.

A file is written as `NAME.partial` and a folder as `.NAME.partial`, beside what they become.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

from megatron_infifpo.errors import UserError


def make_folder(path: str | Path) -> None:
    """Make a folder, and those that it is in, where they are not there.

    Raises:
        UserError: it cannot be made, such as where a file has its name.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from None


def end_block(
    error: BaseException | None, finish: Callable[[], object], discard: Callable[[], None]
) -> None:
    """End a `with` block: finish, or discard where the block or finishing has raised."""
    try:
        if error is None:
            finish()
    except BaseException:
        discard()
        raise
    if error is not None:
        discard()


class Aside:
    """Files that are written aside and get their names together, the first one first.

    As a context manager it publishes them on a normal end and removes them on an exception.
    """

    def __init__(self, *, by_process: bool = False) -> None:
        """Begin with none.

        Args:
            by_process: several processes may write the same files at once; each has its own aside.
        """
        self._ending = f".{os.getpid()}.partial" if by_process else ".partial"
        self._files: dict[Path, Path] = {}

    def path(self, target: str | Path) -> Path:
        """Return where to write a file; a manifest is asked for last, and so is renamed last."""
        target = Path(target)
        self._files[target] = target.with_name(target.name + self._ending)
        return self._files[target]

    def publish(self) -> None:
        """Give all files their names, once all of them are on the disk."""
        for aside in self._files.values():
            _sync(aside)
        if len(self._files) > 1:
            # While files are replaced the last one is not there: nobody opens a mix of old and new.
            next(reversed(self._files)).unlink(missing_ok=True)
        for target, aside in self._files.items():
            os.replace(aside, target)
        for parent in {target.parent for target in self._files}:
            _sync(parent)

    def discard(self) -> None:
        """Remove what was written aside and has no name yet."""
        for aside in self._files.values():
            aside.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        """Return the files."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Publish, or discard after an exception."""
        end_block(error, self.publish, self.discard)


@contextlib.contextmanager
def whole_file(path: str | Path, *, by_process: bool = False) -> Iterator[Path]:
    """Yield where to write a file, which becomes `path` if the block succeeds, else is removed."""
    with Aside(by_process=by_process) as files:
        yield files.path(path)


def write_text(path: str | Path, text: str, *, by_process: bool = False) -> None:
    """Write a UTF-8 file whole or not at all."""
    with whole_file(path, by_process=by_process) as aside:
        aside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_folder(
    path: str | Path, *, first: bool = True, wait: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """Yield an empty folder, which becomes `path` if the block succeeds, else is removed.

    Args:
        path: of a folder that is not there, or is empty.
        first: whether this rank makes and renames it; other ranks may write into it.
        wait: waits for all ranks, which enter and leave the block together.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.partial")
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            make_folder(aside.parent)
            aside.mkdir()
        wait()
        yield aside
        wait()
        if first:
            for inside in [*aside.rglob("*"), aside]:
                _sync(inside)
            os.rename(aside, path)  # an empty folder gives way to it
            _sync(path.parent)
        wait()
    except BaseException:
        # Only the first: other ranks may still write, and would fail for a reason of ours.
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
