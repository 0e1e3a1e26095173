"""One model's log-prob dataset: a float32 for every response token of every record.

    PREFIX.bin, PREFIX.idx   float32, one document a record: chosen, rejected[, pivot_chosen]
    PREFIX.json              the manifest, written last: whose log-probs these are, and of what

A masked record (its text does not fit the model, say) has empty sequences; a scored response never
does, since its end of turn is scored.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.documents import (
    Documents,
    DocumentWriter,
    read_manifest,
    write_manifest,
)
from megatron_infifpo.data.token_dataset import TokenDataset

FORMAT = "megatron_infifpo log-prob dataset"
VERSION = 1
MADE_BY = "tools/score_source.py"
REQUIRED = (
    "model",
    "weights_sha256",
    "tokenizer_sha256",
    "chat_template_sha256",
    "records_sha256",
    "backend",
    "dtype",
    "versions",
)

# log-softmax in float32 may round up to just above 0; more than this is a defect.
ROUNDING = 1e-5


class LogprobWriter:
    """Writes a log-prob dataset record by record; nothing is visible before `finish`.

    As a context manager it finishes on a normal end and discards on an exception.
    """

    def __init__(
        self, prefix: str | Path, *, responses: Sequence[str], manifest: dict[str, Any]
    ) -> None:
        """Open a dataset for writing.

        Args:
            prefix: of the files to write; an older dataset of this name is replaced.
            responses: names of the R responses, a head of `records.RESPONSES`.
            manifest: whose log-probs these are; holds at least the fields of `REQUIRED`.

        Raises:
            ValueError: a field of the manifest is missing.
        """
        missing = [name for name in REQUIRED if name not in manifest]
        if missing:
            raise ValueError(f"the manifest lacks {', '.join(missing)}, expected all of {REQUIRED}")
        self.prefix, self.responses, self.fields = str(prefix), list(responses), dict(manifest)
        self._documents = DocumentWriter(self.prefix, np.float32)
        self._count = 0
        self._masked: dict[str, list[int]] = {}

    def add(
        self,
        record_id: str,
        logprobs: Sequence[np.ndarray] | None,
        *,
        reason: str | None = None,
    ) -> None:
        """Append one record.

        Args:
            record_id: for errors.
            logprobs: R arrays `[L_r]`, or None for a masked record.
            reason: why the record is masked; required exactly then.

        Raises:
            UserError: a value is NaN, infinite or above 0.
            ValueError: not one non-empty array a response, or a reason that does not fit.
        """
        if (logprobs is None) != (reason is not None):
            raise ValueError(f"record {record_id!r}: give log-probs or a reason, one of them")
        if logprobs is None:
            assert reason is not None
            self._masked.setdefault(reason, []).append(self._count)
            arrays = [np.empty(0, dtype=np.float32)] * len(self.responses)
        else:
            arrays = [np.asarray(values, dtype=np.float32) for values in logprobs]
            if len(arrays) != len(self.responses) or any(a.ndim != 1 or not len(a) for a in arrays):
                raise ValueError(
                    f"record {record_id!r}: shapes {[a.shape for a in arrays]}, expected one "
                    f"non-empty vector for each of {self.responses}"
                )
            for name, values in zip(self.responses, arrays, strict=True):
                self._check(record_id, name, values)
            arrays = [np.minimum(values, 0.0) for values in arrays]
        self._documents.add(arrays)
        self._count += 1

    def _check(self, record_id: str, name: str, values: np.ndarray) -> None:
        bad = ~np.isfinite(values) | (values > ROUNDING)
        if bad.any():
            position = int(bad.argmax())
            raise UserError(
                f"record {record_id!r}: log-prob {values[position]} at token {position} of "
                f"{name!r} under {self.fields['model']}, expected a finite number of at most 0; "
                "the model's weights or its dtype are at fault"
            )

    def finish(self) -> dict[str, Any]:
        """Complete the dataset and return its manifest.

        Raises:
            UserError: no record was added.
        """
        if not self._count:
            self.discard()
            raise UserError(
                f"there are no records to write to {self.prefix}, expected at least one"
            )
        # While files are replaced there is no manifest, so a mix of old and new cannot be opened.
        Path(f"{self.prefix}.json").unlink(missing_ok=True)
        self._documents.finish()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "count": self._count,
            "responses": self.responses,
            **self.fields,
            "masked": self._masked,
        }
        write_manifest(self.prefix, manifest)
        return manifest

    def discard(self) -> None:
        """Delete what was written."""
        self._documents.discard()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish, or discard after an exception."""
        if error is None:
            self.finish()
        else:
            self.discard()


class LogprobStore:
    """Reads a log-prob dataset; opening does not loop over the records.

    Attributes:
        manifest: the content of `PREFIX.json`.
        responses: names of the R responses.
        token_counts: int32 `[N, R]` in the model's own tokens, 0 where masked.
        masked_records: bool `[N]`.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a dataset.

        Raises:
            UserError: a file is missing, truncated or of another format.
        """
        self.prefix = prefix = str(prefix)
        self.manifest = read_manifest(prefix, format_name=FORMAT, version=VERSION, made_by=MADE_BY)
        self.responses = tuple(self.manifest["responses"])
        self._documents = Documents(prefix, np.float32, len(self.responses))
        self.token_counts: np.ndarray = self._documents.lengths
        self.masked_records: np.ndarray = ~self.token_counts.any(axis=1)
        if len(self) != self.manifest["count"]:
            raise UserError(
                f"{prefix}.idx holds {len(self)} records, expected {self.manifest['count']} by "
                f"{prefix}.json; score again with {MADE_BY}"
            )
        empty = (self.token_counts == 0).any(axis=1) & ~self.masked_records
        if empty.any():
            raise UserError(
                f"{prefix}.idx has no log-probs for one response of record {int(empty.argmax())}, "
                f"expected all responses or none; score again with {MADE_BY}"
            )

    def __len__(self) -> int:
        """Return the number of records, masked ones included."""
        return len(self._documents)

    def sums(self, index: int) -> np.ndarray:
        """Return the sum of each response's log-probs, float64 `[R]`; 0 where masked."""
        if self.masked_records[index]:
            return np.zeros(len(self.responses))
        starts = [0, *itertools.accumulate(self.token_counts[index, :-1].tolist())]
        return np.add.reduceat(self._documents.view(index), starts, dtype=np.float64)

    def counts(self, index: int) -> np.ndarray:
        """Return the number of tokens of each response, int32 `[R]`; 0 where masked."""
        return self.token_counts[index]

    def masked(self, index: int) -> bool:
        """Whether the model has no log-probs for this record."""
        return bool(self.masked_records[index])

    def reason(self, index: int) -> str | None:
        """Return why a record is masked, or None."""
        found = (why for why, indices in self.manifest["masked"].items() if index in indices)
        return next(found, None)

    def logprobs(self, index: int, response: int) -> np.ndarray:
        """Return one response's log-probs, float32 `[L_r]`; empty where masked."""
        return self._documents.sequences(index)[response]

    def check_against(self, tokens: TokenDataset, *, same_tokenizer: bool) -> None:
        """Check that these log-probs are of the token dataset's records.

        Args:
            tokens: the pivot's token dataset.
            same_tokenizer: the model is the pivot, so every response has the same tokens there.

        Raises:
            UserError: the fingerprint of the records, the count, the responses or, for the
                pivot, the tokenizer or the length of a response disagrees; says which.
        """
        where = f"{self.prefix} ({self.manifest['model']}) does not fit {tokens.prefix}"
        fix = f"score the records of {tokens.manifest['source_files']} again"
        if len(self) != len(tokens):
            raise UserError(
                f"{where}: the count is {len(self)} records, expected {len(tokens)}; {fix}"
            )
        if self.manifest["records_sha256"] != tokens.records_sha256:
            raise UserError(
                f"{where}: its fingerprint of the records is "
                f"{self.manifest['records_sha256'][:12]}, expected {tokens.records_sha256[:12]}: "
                f"these are log-probs of other records or of another order; {fix}"
            )
        if self.responses != tokens.responses:
            raise UserError(
                f"{where}: its responses are {list(self.responses)}, expected "
                f"{list(tokens.responses)}; {fix}"
            )
        if not same_tokenizer:
            return
        for name in ("tokenizer_sha256", "chat_template_sha256"):
            found, expected = self.manifest[name], tokens.manifest["tokenizer"][name]
            if found != expected:
                raise UserError(
                    f"{where}: its {name} is {found[:12]}, expected {expected[:12]}: the initial "
                    f"pivot must have the tokenizer and the chat template of {tokens.prefix}"
                )
        wrong = (self.token_counts != tokens.response_lengths).any(axis=1) & ~self.masked_records
        if wrong.any():
            index = int(wrong.argmax())
            raise UserError(
                f"{where}: the lengths of the responses of record {tokens.ids(index)!r} are "
                f"{self.token_counts[index].tolist()} tokens, expected "
                f"{tokens.response_lengths[index].tolist()} ({int(wrong.sum())} such records); the "
                f"initial pivot must have the tokenizer and the chat template of {tokens.prefix}"
            )
