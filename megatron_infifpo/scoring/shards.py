"""Numbered shards of a scoring job: written aside and renamed, found again, checked when merged.

Which records form a shard depends on the records only, so a job gives the same bytes however many
ranks score it and however often it is interrupted.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord, iter_records, records_fingerprint

PLAN = "plan.json"
Said = tuple[str | None, Sequence[str]]
"""A record's note (why it is masked or cut) and remarks (`TokenizedRecord.notes`)."""


def read_shards(
    paths: Sequence[str], size: int, wanted: set[int], *, on_bad: str
) -> Iterator[tuple[int, tuple[PreferenceRecord, ...]]]:
    """Yield `(number, records)` of the wanted shards of `size` records; only one is in memory.

    Raises:
        UserError: the files end before the last wanted shard.
    """
    if not wanted:
        return
    for number, records in enumerate(batched(iter_records(paths, on_bad=on_bad), size)):
        if number in wanted:
            yield number, records
        if number == max(wanted):
            return
    raise UserError(
        f"{', '.join(map(str, paths))}: the records end before shard {max(wanted)}; they have "
        "changed while they were scored, or differ between nodes"
    )


class ShardFolder:
    """The finished shards of one scoring job, in a folder beside its output."""

    def __init__(self, folder: Path):
        """Name the folder; nothing is read or written."""
        self.folder = folder

    def open(self, plan: dict[str, Any]) -> None:
        """Create the folder for a job, or check that it is this job's.

        Args:
            plan: what the job's numbers depend on; JSON.

        Raises:
            UserError: the folder holds shards of another job.
        """
        path = self.folder / PLAN
        if not path.exists():
            self.remove()  # shards without a plan may be anybody's
            self.folder.mkdir(parents=True)
            aside = self.folder / f".{PLAN}.partial"
            aside.write_text(json.dumps(plan, indent=1), encoding="utf-8")
            aside.rename(path)
        found = json.loads(path.read_text(encoding="utf-8"))
        if difference := different(plan, found):
            raise UserError(
                f"{self.folder} holds shards of another job: {difference}; delete the folder or "
                "choose another --output"
            )
        for aside in self.folder.glob(".*.partial"):  # of ranks that were killed while writing
            aside.unlink(missing_ok=True)

    def path(self, shard: int) -> Path:
        """File of a finished shard."""
        return self.folder / f"{shard:06d}.npz"

    def is_finished(self, shard: int) -> bool:
        """Whether a shard is there; a shard in the making has another name."""
        return self.path(shard).exists()

    def write(
        self,
        shard: int,
        records: Sequence[PreferenceRecord],
        said: Sequence[Said],
        logprobs: Sequence[Sequence[np.ndarray]],
    ) -> None:
        """Write a shard: what is said of its records `[N]`, and their log-probs by response."""
        responses = [values for record in logprobs for values in record]
        aside = self.folder / f".{shard:06d}.npz.partial"
        try:
            with open(aside, "wb") as file:
                np.savez(
                    file,
                    records_sha256=np.array(records_fingerprint(records)),
                    said=np.array(json.dumps(said)),
                    lengths=np.array([len(values) for values in responses], dtype=np.int64),
                    values=np.concatenate([np.zeros(0, np.float32), *responses]),
                )
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} is not there for rank {os.environ.get('RANK', '0')}, expected a "
                "folder that all nodes see"
            ) from None
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        aside.rename(self.path(shard))

    def read(
        self, shard: int, records: Sequence[PreferenceRecord]
    ) -> Iterator[tuple[PreferenceRecord, Said, list[np.ndarray]]]:
        """Yield the records of a shard, each with what is said of it and one array a response.

        Raises:
            UserError: the shard is missing, damaged or of other records.
        """
        path, width = self.path(shard), len(records[0].responses)
        try:
            with np.load(path, allow_pickle=False) as file:
                said, lengths, values = (
                    json.loads(str(file["said"])),
                    file["lengths"],
                    file["values"],
                )
                identity = str(file["records_sha256"])
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing although its rank has finished; do all nodes see this folder?"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path} is damaged ({error}): delete it and run this command again"
            ) from None
        fits = len(said) == len(records) and len(lengths) == width * len(records)
        if not fits or lengths.sum() != len(values) or identity != records_fingerprint(records):
            raise UserError(
                f"{path} is not of the {len(records)} records of shard {shard}: the input has "
                "changed while it was scored; delete the folder and score again"
            )
        pieces = iter(np.split(values, np.cumsum(lengths)[:-1]))
        for record, (note, remarks) in zip(records, said, strict=True):
            yield record, (note, remarks), [next(pieces) for _ in range(width)]

    def remove(self) -> None:
        """Delete the folder once its shards are merged."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def different(wanted: dict[str, Any], found: dict[str, Any]) -> str | None:
    """Say where two descriptions of a job differ first, or return None."""
    for name in sorted(wanted.keys() | found.keys()):
        a, b = wanted.get(name), found.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            if difference := different(a, b):
                return difference
        elif a != b and name != "path":  # the same tokenizer may have moved
            return f"its {name} is {b!r}, this one's is {a!r}"
    return None
