"""How large the files of `--top-k` will be, from a sample of the records."""

from collections.abc import Sequence

import numpy as np

from megatron_infifpo.records.records import RESPONSES, PreferenceRecord
from megatron_infifpo.scoring.job import ScoringJob
from megatron_infifpo.scoring.rows import Limits
from megatron_infifpo.tokens.encoding import encode_or_refuse, scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class EvenSample:
    """Some records of a stream, evenly spread over it.

    Attributes:
        records: at most `most` of them, and at least half as many where there are.
    """

    def __init__(self, most: int = 200) -> None:
        """Begin with none."""
        self.records: list[PreferenceRecord] = []
        self._most, self._step, self._seen = most, 1, 0

    def add(self, record: PreferenceRecord) -> None:
        """See the next record of the stream."""
        if self._seen % self._step == 0 and len(self.records) == self._most:
            self.records, self._step = self.records[::2], 2 * self._step
        if self._seen % self._step == 0:
            self.records.append(record)
        self._seen += 1


def scored_tokens(
    records: Sequence[PreferenceRecord], tokenizer: ChatTokenizer, limits: Limits, width: int
) -> np.ndarray:
    """Return how many tokens of each response are scored, int64 `[N, R]`; 0 where masked."""
    counts = np.zeros((len(records), width), np.int64)
    for row, record in zip(counts, records, strict=True):
        whole = encode_or_refuse([record], tokenizer)[0]
        if limits.other_domain(record) or isinstance(whole, str):
            continue
        tokens = limits.apply(whole)[0]
        if tokens is not None:
            marks = scored_marks(tokens.response_ids, tokens.scored)
            row[: len(marks)] = [int(mark.sum()) for mark in marks]
    return counts


def size_line(job: ScoringJob, names: Sequence[str], count: int, tokens: np.ndarray) -> str:
    """Say how large the files of `--top-k` will be.

    Args:
        job: one with `--top-k`.
        names: of a record's responses.
        count: records.
        tokens: `[N, R]`, scored ones of some of them.
    """
    assert job.top_k is not None
    # An id, its log-prob and the tail's; see references.top_k.
    by_response = tokens.mean(axis=0) * count * (6 * job.top_k + 2)
    chosen = job.top_k_responses == "chosen"
    size = by_response[0] if chosen else by_response.sum()
    line = (
        f"top-{job.top_k} of {count:,} records: about {in_words(size)} in {job.output}_topk_*, and "
        "as much in its shards until they are joined"
    )
    if not chosen and names[0] in RESPONSES:
        line += f" (--top-k-responses chosen: {in_words(by_response[0])})"
    return line


def in_words(size: float) -> str:
    """Write a number of bytes with two digits at least."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} bytes"
