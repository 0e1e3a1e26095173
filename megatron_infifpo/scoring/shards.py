"""What a shard of a scoring job holds: its records' log-probs, and what is said of them.

With `--top-k` also the most probable tokens, the bytes of what was scored, and its texts.
"""

import json
import zipfile
from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord, iter_records, records_fingerprint
from megatron_infifpo.references.top_k import TEXT, Packed
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


class ShardRecord(NamedTuple):
    """A record of a shard.

    Attributes:
        record: as it was read.
        said: of it.
        logprobs: one array a response; empty where it is masked.
        top: one entry a response; none where it is masked, or without `--top-k`.
    """

    record: PreferenceRecord
    said: Said
    logprobs: list[np.ndarray]
    top: list[Packed]


def write_shard(
    file: BinaryIO,
    records: Sequence[PreferenceRecord],
    said: Sequence[Said],
    logprobs: Sequence[Sequence[np.ndarray]],
    top: Sequence[Sequence[Packed]] | None = None,
) -> None:
    """Write what is said of records `[N]`, their log-probs by response, and the top k if any."""
    responses = [values for record in logprobs for values in record]
    arrays: dict[str, Any] = {
        "records_sha256": np.array(records_fingerprint(records)),
        "said": np.array(json.dumps(said)),
        "lengths": np.array([len(values) for values in responses], dtype=np.int64),
        "values": np.concatenate([np.zeros(0, np.float32), *responses]),
    }
    if top is not None:
        arrays |= _top_arrays([response for record in top for response in record])
    np.savez(file, **arrays)


def _top_arrays(found: Sequence[Packed]) -> dict[str, np.ndarray]:
    """Join the responses of all records that are scored."""
    return {
        "top_lengths": np.array([[len(r.ids), len(r.lengths)] for r in found], np.int64),
        "top_ids": np.concatenate([r.ids.ravel() for r in found] or [np.zeros(0, np.int32)]),
        "top_logps": np.concatenate([r.logps.ravel() for r in found] or [np.zeros(0, np.uint16)]),
        "byte_lengths": np.concatenate([r.lengths for r in found] or [np.zeros(0, np.uint16)]),
        "texts": np.array([r.text for r in found], TEXT),
    }


def read_shard(
    file: BinaryIO, number: int, records: Sequence[PreferenceRecord], k: int | None = None
) -> Iterator[ShardRecord]:
    """Yield the records of a shard; with the `k` most probable tokens that it was scored with.

    Raises:
        UserError: the file is damaged, or of other records.
    """
    widths = [len(record.responses) for record in records]
    try:
        with np.load(file, allow_pickle=False) as content:
            said, identity = json.loads(str(content["said"])), str(content["records_sha256"])
            lengths, values = content["lengths"], content["values"]
            top = iter(() if k is None else _top_of(content, k))
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
        found = [next(pieces) for _ in range(width)]
        scored = k is not None and any(map(len, found))
        its = [next(top) for _ in found] if scored else []
        yield ShardRecord(record, (note, remarks), found, its)


def _top_of(content: Any, k: int) -> list[Packed]:
    """Return what `_top_arrays` has joined."""
    kept, tokens = content["top_lengths"].reshape(-1, 2).T
    ids, logps = content["top_ids"].reshape(-1, k), content["top_logps"].reshape(-1, k + 1)
    parts = [
        np.split(values, np.cumsum(counts)[:-1])
        for values, counts in ((ids, kept), (logps, kept), (content["byte_lengths"], tokens))
    ]
    texts = content["texts"].tolist()
    return [Packed(*part) for part in zip(*parts, texts, strict=True)] if texts else []
