"""A tokenizer for tests of what is scored: random ids and marks, and records that it refuses."""

from collections.abc import Collection, Sequence

import numpy as np

from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.tokens.tokenization import ChatTokenizer, RefusedRecordError, TokenizedRecord
from support.datasets import byte_tokenizer

VOCABULARY = 40


class Marking:
    """Gives each record random ids, of which some are not scored.

    Attributes:
        refused: ids of records that it refuses -> why.
    """

    path = "marking"

    def __init__(self, refused: dict[str, str] | None = None, plain: Collection[str] = ()) -> None:
        """Say which records are refused, and which have no token that is not scored."""
        self.refused, self.plain = refused or {}, plain

    def encode_batch(self, records: Sequence[PreferenceRecord]) -> list[TokenizedRecord]:
        return [self.encode(record) for record in records]

    def encode(self, record: PreferenceRecord) -> TokenizedRecord:
        if record.id in self.refused:
            raise RefusedRecordError(record.id, self.refused[record.id])
        rng = np.random.default_rng(list(record.id.encode()))

        def ids(most: int) -> np.ndarray:
            return rng.integers(0, VOCABULARY, rng.integers(1, most), dtype=np.int32)

        prompt, responses = ids(9), tuple(ids(12) for _ in record.responses)
        marks = tuple(rng.random(len(part)) < 0.6 for part in responses)
        for mark in marks:
            mark[rng.integers(len(mark))] = True
        scored = None if record.id in self.plain else marks
        return TokenizedRecord(prompt, responses, scored, ("marked",) if scored else ())

    def describe(self) -> dict:
        return ChatTokenizer(byte_tokenizer()).describe()

    @property
    def tokenizer(self) -> "Marking":
        """What decodes: itself."""
        return self

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
