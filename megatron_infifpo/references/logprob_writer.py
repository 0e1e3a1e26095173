"""Write a log-prob dataset; `logprob_store` says what its files hold."""

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import RESPONSES
from megatron_infifpo.references.logprob_store import FORMAT
from megatron_infifpo.references.top_k import FILES, ROUNDING, Packed, TopKWriter
from megatron_infifpo.storage.aside import Aside, end_block, make_folder
from megatron_infifpo.storage.documents import DocumentWriter, write_array
from megatron_infifpo.storage.notes import Notes

REQUIRED = (
    "model",
    "weights_sha256",
    "tokenizer",
    "records_sha256",
    "backend",
    "dtype",
    "versions",
)

SUMMARY = ("_sums.npy", "_counts.npy")


class LogprobWriter:
    """Writes a log-prob dataset record by record; nothing is visible before `finish`.

    As a context manager it finishes on a normal end and discards on an exception.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        responses: Sequence[str],
        manifest: dict[str, Any],
        values: bool = True,
        top_k: dict[str, Any] | None = None,
    ) -> None:
        """Open a dataset for writing.

        Args:
            prefix: of the files to write; an older dataset of this name is replaced.
            responses: names of the R responses, see `records.response_names`; a record of lists
                may have fewer.
            manifest: whose log-probs these are; holds at least the fields of `REQUIRED`.
            values: whether there is a log-prob for every scored token (`add`), or sums only
                (`add_sums`).
            top_k: the manifest's `top_k`, of a dataset with the most probable tokens, as
                `top_k.SCHEMA` says; None: without.

        Raises:
            ValueError: a field of the manifest is missing.
        """
        missing = [name for name in REQUIRED if name not in manifest]
        if missing:
            raise ValueError(f"the manifest lacks {', '.join(missing)}, expected all of {REQUIRED}")
        self.prefix, self.responses, self.fields = str(prefix), list(responses), dict(manifest)
        self._least = len(responses) if responses[0] in RESPONSES else 2
        make_folder(Path(prefix).parent)
        self._files = Aside()
        self._documents = DocumentWriter(self.prefix, np.float32, self._files) if values else None
        self._top: TopKWriter | None = None
        if top_k is not None:
            self._top = TopKWriter(self.prefix, top_k, len(responses), self._files)
            self.fields["top_k"] = top_k
        # Arrays of C numbers: a million records must not become millions of Python objects.
        self._sums, self._counts = array("d"), array("i")
        self.notes, self._remarks = Notes(), Notes()

    def __len__(self) -> int:
        """Return the number of records so far."""
        return len(self._sums) // len(self.responses)

    def add(
        self,
        record_id: str,
        logprobs: Sequence[np.ndarray],
        *,
        note: str | None = None,
        remarks: Sequence[str] = (),
        top: Sequence[Packed] = (),
    ) -> None:
        """Append one record.

        Args:
            record_id: for errors.
            logprobs: an array a response, of its scored tokens.
            note: what was done to the record's text, if anything was.
            remarks: `TokenizedRecord.notes`.
            top: one entry a response, of a dataset with `top_k`.

        Raises:
            UserError: a value is NaN, infinite or above 0.
            ValueError: an array is empty, there are too few or too many, or `top` does not fit.
        """
        arrays = [np.asarray(values, dtype=np.float32) for values in logprobs]
        fits = self._least <= len(arrays) <= len(self.responses)
        if not fits or any(a.ndim != 1 or not len(a) for a in arrays):
            raise ValueError(
                f"record {record_id!r}: shapes {[a.shape for a in arrays]}, expected one "
                f"non-empty vector for each of {self.responses}"
            )
        for name, values in zip(self.responses, arrays, strict=False):
            self._check(record_id, name, values)
        arrays = [np.minimum(values, 0.0) for values in arrays]
        assert self._documents is not None, "this dataset holds sums only"
        counts = [len(values) for values in arrays]
        if self._top is not None:
            self._top.add(record_id, top, counts)
        self._documents.add(arrays)
        for remark in remarks:
            self._remarks.add(len(self), remark)
        sums = [float(values.sum(dtype=np.float64)) for values in arrays]
        self._append(sums, counts, note)

    def add_sums(self, record_id: str, sums: Sequence[float], counts: Sequence[int]) -> None:
        """Append one record of which only sums `[R]` over `counts` `[R]` tokens are known.

        Raises:
            UserError: a sum is NaN, infinite or above 0, or a count is not at least 1.
        """
        assert self._least <= len(sums) <= len(self.responses), f"{len(sums)} sums"
        for name, total, count in zip(self.responses, sums, counts, strict=False):
            self._check(record_id, name, np.array([total]))
            if count < 1:
                raise UserError(
                    f"record {record_id!r}: {count} tokens in {name!r}, expected at least 1"
                )
        assert self._documents is None, "this dataset holds every value"
        self._append([min(float(total), 0.0) for total in sums], counts, None)

    def mask(self, record_id: str, reason: str) -> None:
        """Append one record that the model takes no part in, and why."""
        if not reason:
            raise ValueError(f"record {record_id!r} is masked for no reason")
        nothing = [0] * len(self.responses)
        if self._documents is not None:
            self._documents.add([np.empty(0, dtype=np.float32)] * len(nothing))
        if self._top is not None:
            self._top.mask()
        self._append(nothing, nothing, reason)

    def _append(self, sums: Sequence[float], counts: Sequence[int], note: str | None) -> None:
        if note:
            self.notes.add(len(self), note)
        lacks = [0] * (len(self.responses) - len(sums))
        self._sums.extend([*sums, *lacks])
        self._counts.extend([*counts, *lacks])

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
        if not len(self):
            self.discard()
            raise UserError(
                f"there are no records to write to {self.prefix}, expected at least one"
            )
        for part in (self._documents, self._top):
            if part is not None:
                part.close()
        tables: list[np.ndarray] = [
            np.frombuffer(self._sums, np.float64),
            np.frombuffer(self._counts, np.int32),
        ]
        for suffix, table in zip(SUMMARY, tables, strict=True):
            write_array(f"{self.prefix}{suffix}", table.reshape(len(self), -1), self._files)
        manifest = {
            **self.fields,
            **FORMAT.fields,
            "count": len(self),
            "responses": self.responses,
            "values": self._documents is not None,
            **self.notes.fields("note"),
            **self._remarks.fields("remark"),
        }
        FORMAT.write(self.prefix, manifest, self._files)
        self._remove_older()
        self._files.publish()
        return manifest

    def _remove_older(self) -> None:
        """Remove files of an older dataset of this name that this one has not."""
        lacks = [] if self._documents else [".bin", ".idx"]
        lacks += [] if self._top else FILES
        paths = [Path(self.prefix + suffix) for suffix in lacks]
        if any(path.exists() for path in paths):
            Path(f"{self.prefix}.json").unlink(missing_ok=True)
        for path in paths:
            path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete what was written."""
        for part in (self._documents, self._top):
            if part is not None:
                part.abandon()
        self._files.discard()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Finish, or discard after an exception."""
        end_block(error, self.finish, self.discard)
