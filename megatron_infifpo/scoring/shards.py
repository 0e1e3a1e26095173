"""Numbered shards of a scoring job: planned from the data alone, written aside, resumed, merged.

Which records form a shard and which responses share a packed row depends on the records only, never
on the number of ranks, so a job gives the same bytes however many ranks score it and however often
it is interrupted.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_infifpo.cli import UserError

PLAN = "plan.json"


def plan_rows(lengths: np.ndarray, token_budget: int) -> list[list[int]]:
    """Pack records into rows of at most `token_budget` tokens, longest first.

    Args:
        lengths: `[N]` tokens of each record (all its responses, each with its prompt); records of
            length 0 are masked and left out.
        token_budget: tokens of a row; a longer record gets a row of its own.

    Returns:
        Record indices by row.
    """
    rows: list[list[int]] = []
    used = token_budget + 1
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if length == 0:
            break
        if used + length > token_budget:
            rows.append([])
            used = 0
        rows[-1].append(index)
        used += length
    return rows


class ShardFolder:
    """The finished shards of one scoring job, in a folder beside its output."""

    def __init__(self, folder: Path, plan: dict):
        """Open or create the folder for a job.

        Args:
            folder: where the shards are.
            plan: what the job's numbers depend on; JSON.

        Raises:
            UserError: the folder holds shards of another job.
        """
        self.folder = folder
        path = folder / PLAN
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._write(path, json.dumps(plan, indent=1).encode())
        found = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(k for k in plan.keys() | found.keys() if plan.get(k) != found.get(k))
        if different:
            name = different[0]
            raise UserError(
                f"{folder} holds shards of another job: its {name} is {found.get(name)!r}, this "
                f"one's is {plan.get(name)!r}; delete the folder or choose another --output"
            )

    def path(self, shard: int) -> Path:
        """File of a finished shard."""
        return self.folder / f"{shard:06d}.npz"

    def is_finished(self, shard: int) -> bool:
        """Whether a shard is there; a shard in the making has another name."""
        return self.path(shard).exists()

    def write(self, shard: int, records: list[list[np.ndarray]]) -> None:
        """Write a shard: float32 log-probs of every response of its records, in record order."""
        responses = [values for record in records for values in record]
        aside = self.folder / f".{shard:06d}.{os.getpid()}.partial"
        with open(aside, "wb") as file:
            np.savez(
                file,
                lengths=np.array([len(values) for values in responses], dtype=np.int64),
                values=np.concatenate([np.zeros(0, np.float32), *responses]),
            )
            file.flush()
            os.fsync(file.fileno())
        aside.rename(self.path(shard))

    def read(self, shard: int, responses: int) -> Iterator[list[np.ndarray]]:
        """Yield the log-probs of a shard's records, `responses` arrays each."""
        with np.load(self.path(shard), allow_pickle=False) as file:
            lengths, values = file["lengths"], file["values"]
        pieces = np.split(values, np.cumsum(lengths)[:-1])
        for first in range(0, len(pieces), responses):
            yield pieces[first : first + responses]

    def remove(self) -> None:
        """Delete the folder once its shards are merged."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def _write(self, path: Path, content: bytes) -> None:
        # Several ranks may create the same plan at once: each writes aside, any rename will do.
        aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
        aside.write_bytes(content)
        aside.rename(path)
