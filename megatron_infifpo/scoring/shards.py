"""What a shard of a scoring job holds: its records' log-probs, and what is said of them."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import BinaryIO

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord, iter_records, records_fingerprint
from megatron_infifpo.scoring.job import ScoringJob

Said = tuple[str | None, Sequence[str]]
"""A record's note (why it is masked or cut) and remarks (`TokenizedRecord.notes`)."""


def read_records(
    job: ScoringJob, wanted: set[int]
) -> Iterator[tuple[int, tuple[PreferenceRecord, ...]]]:
    """Yield the wanted shards' numbers and records; only one shard is in memory.

    Raises:
        UserError: the files end before the last wanted shard.
    """
    if not wanted:
        return
    records = iter_records(job.input, on_bad=job.on_bad_record, lists=job.lists)
    for number, shard in enumerate(batched(records, job.shard_records)):
        if number in wanted:
            yield number, shard
        if number == max(wanted):
            return
    raise UserError(
        f"{', '.join(map(str, job.input))}: the records end before shard {max(wanted)}; they have "
        "changed while they were scored, or differ between nodes"
    )


def write_shard(
    file: BinaryIO,
    records: Sequence[PreferenceRecord],
    said: Sequence[Said],
    logprobs: Sequence[Sequence[np.ndarray]],
) -> None:
    """Write what is said of records `[N]`, and their log-probs by response."""
    responses = [values for record in logprobs for values in record]
    np.savez(
        file,
        records_sha256=np.array(records_fingerprint(records)),
        said=np.array(json.dumps(said)),
        lengths=np.array([len(values) for values in responses], dtype=np.int64),
        values=np.concatenate([np.zeros(0, np.float32), *responses]),
    )


def read_shard(
    file: BinaryIO, number: int, records: Sequence[PreferenceRecord]
) -> Iterator[tuple[PreferenceRecord, Said, list[np.ndarray]]]:
    """Yield the records of a shard, each with what is said of it and one array a response.

    Raises:
        UserError: the file is damaged, or of other records.
    """
    widths = [len(record.responses) for record in records]
    try:
        with np.load(file, allow_pickle=False) as content:
            said, identity = json.loads(str(content["said"])), str(content["records_sha256"])
            lengths, values = content["lengths"], content["values"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{file.name} is damaged ({error}): delete it and run this command again"
        ) from None
    fits = len(said) == len(records) and len(lengths) == sum(widths)
    if not fits or lengths.sum() != len(values) or identity != records_fingerprint(records):
        raise UserError(
            f"{file.name} is not of the {len(records)} records of shard {number}: the input has "
            "changed while it was scored; delete the folder and score again"
        )
    pieces = iter(np.split(values, np.cumsum(lengths)[:-1]))
    for record, (note, remarks), width in zip(records, said, widths, strict=True):
        yield record, (note, remarks), [next(pieces) for _ in range(width)]
