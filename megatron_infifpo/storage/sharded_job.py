"""A job in numbered shards: each is there whole or not at all, and all are joined in order.

What a shard holds depends on the job's input alone, so a job gives the same bytes however many
processes share it, and however often it is interrupted. The processes need not know each other:
all that they share is the folder.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_infifpo.errors import UserError
from megatron_infifpo.ranks import rank
from megatron_infifpo.storage.aside import make_folder, whole_file, write_text

PLAN = "plan.json"


class ShardedJob:
    """The finished shards of a job, in a folder beside its output: `plan.json`, `000000.npz`, ...

    Attributes:
        folder: `OUTPUT.shards`.
    """

    def __init__(self, output: str | Path, suffix: str, *, free: Collection[str] = ()) -> None:
        """Name the job; nothing is read or written.

        Args:
            output: what the shards are joined into.
            suffix: of the shards' files, such as ".npz".
            free: names in a plan, at any depth, that may differ, such as where a thing lies.
        """
        self.folder = Path(f"{output}.shards")
        self._suffix, self._free = suffix, free

    def claim(self, plan: dict[str, Any]) -> None:
        """Make the folder for a job, or check that it is this job's; several processes may.

        Args:
            plan: what the job's result depends on; JSON.

        Raises:
            UserError: the folder cannot be made, or holds shards of another job or without a plan.
        """
        path = self.folder / PLAN
        if not path.exists():
            make_folder(self.folder)
            # The plan is written first; asked for again, since another process may have done so.
            if any(self.folder.glob(f"*{self._suffix}")) and not path.exists():
                raise UserError(
                    f"{self.folder} holds shards of nobody knows which job: {PLAN} is missing; "
                    "delete the folder or choose another --output"
                )
            write_text(path, json.dumps(plan, indent=1), by_process=True)
        found = json.loads(path.read_text(encoding="utf-8"))
        if difference := different(plan, found, self._free):
            raise UserError(
                f"{self.folder} holds shards of another job: {difference}; delete the folder or "
                "choose another --output"
            )

    def path(self, number: int) -> Path:
        """File of a finished shard; in the making it has another name."""
        return self.folder / f"{number:06d}{self._suffix}"

    def missing(self, count: int) -> list[int]:
        """Which of `count` shards are not finished."""
        return [number for number in range(count) if not self.path(number).exists()]

    @contextlib.contextmanager
    def writing(self, number: int) -> Iterator[BinaryIO]:
        """Yield a file that becomes a shard if the block succeeds.

        Raises:
            UserError: the folder is not there.
        """
        try:
            with whole_file(self.path(number)) as aside, aside.open("wb") as file:
                yield file
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} is not there for rank {rank()}, expected a folder that all nodes "
                "see"
            ) from None

    def files(self, count: int) -> Iterator[BinaryIO]:
        """Yield all shards in order, opened for reading.

        Raises:
            UserError: one is missing.
        """
        for number in range(count):
            path = self.path(number)
            try:
                file = path.open("rb")
            except FileNotFoundError:
                raise UserError(
                    f"{path} is missing although its rank has finished; do all nodes see this "
                    "folder?"
                ) from None
            with file:
                yield file

    def remove(self) -> None:
        """Delete the folder once its shards are joined; another process may be doing so, too."""
        shutil.rmtree(self.folder, ignore_errors=True)


def accept_finished(
    output: str | Path,
    wanted: dict[str, Any],
    manifest: dict[str, Any],
    read: Callable[[], object],
    free: Collection[str] = (),
) -> None:
    """Accept output that this very job has written, and say so.

    Args:
        output: prefix of its files.
        wanted: what this job's manifest would say.
        manifest: what it says.
        read: opens every file.
        free: names that may differ, at any depth.

    Raises:
        UserError: it is of another job, or not whole.
    """
    found = {name: manifest.get(name) for name in wanted}
    if difference := different(wanted, found, free):
        raise UserError(
            f"{output}.json exists and is of another job: {difference}; delete it or choose "
            "another --output"
        )
    try:
        read()
    except UserError as error:
        raise UserError(f"{error}; delete {output}.json first, which calls it complete") from None
    print(f"{output} is complete already")


def different(
    wanted: dict[str, Any], found: dict[str, Any], free: Collection[str] = ()
) -> str | None:
    """Say where two descriptions of a job differ first, or return None.

    Args:
        wanted: this job's; what JSON cannot hold is compared as JSON writes it.
        found: what a file says.
        free: names that may differ, at any depth.
    """
    wanted = json.loads(json.dumps(wanted))
    for name in sorted((wanted.keys() | found.keys()) - set(free)):
        a, b = wanted.get(name), found.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if difference := different(a, b, free):
                return difference
        elif a != b:
            return f"its {name} is {b!r}, this one's is {a!r}"
    return None
