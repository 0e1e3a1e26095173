"""Write a soft-target data set; `soft_targets` says what its files hold."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from megatron_infifpo.references.soft_targets import (
    FILES,
    FORMAT,
    GROUPS_FILE,
    VALUES,
    VALUES_FILE,
    SoftTargets,
    add_values,
)
from megatron_infifpo.storage.aside import Aside, end_block, make_folder
from megatron_infifpo.storage.documents import DocumentWriter


class SoftTargetWriter:
    """Writes a soft-target data set record by record; nothing is visible before `finish`.

    As a context manager it finishes on a normal end and discards on an exception.

    Attributes:
        fields: of the manifest; what is known at the end only may be added until then.
    """

    def __init__(
        self,
        prefix: str | Path,
        *,
        responses: Sequence[str],
        fusion: str,
        groups: Sequence[np.ndarray] | None = None,
        manifest: dict[str, Any],
    ) -> None:
        """Open a data set for writing.

        Args:
            prefix: of the files to write.
            responses: names of the R responses of the token data set.
            fusion: how sources are fused; "none": their own values are kept.
            groups: ids of each group; None where there are no groups.
            manifest: the other fields of the manifest.
        """
        self.prefix, self.fields = str(prefix), dict(manifest)
        self.fields |= {"responses": list(responses), "fusion": fusion}
        self._fused, self._width, self._count = fusion != VALUES, len(responses), 0
        self._largest_id = -1
        make_folder(Path(prefix).parent)
        self._files, self._digest = Aside(), hashlib.sha256()
        kinds = FILES if self._fused else {VALUES_FILE: np.uint16}
        self._documents = {
            name: DocumentWriter(self.prefix + name, kind, self._files)
            for name, kind in kinds.items()
        }
        if groups is not None:
            self._documents[GROUPS_FILE] = DocumentWriter(
                self.prefix + GROUPS_FILE, np.int32, self._files
            )
            for group in groups:
                ids = np.asarray(group, np.int32)
                self._note_ids(ids)
                self._write(GROUPS_FILE, [ids])

    def __len__(self) -> int:
        """Return the number of records so far."""
        return self._count

    def add(self, targets: Sequence[SoftTargets | None]) -> None:
        """Append one record.

        Args:
            targets: of each of its first responses, None of one without; others have none.
        """
        found: list[dict[str, np.ndarray]] = []
        for one in targets:
            found.append({} if one is None else self._pack(one))
        for name in self._documents:
            if name == GROUPS_FILE:
                continue
            kind = FILES.get(name, np.uint16)
            parts = [part.get(name, np.empty(0, kind)).ravel() for part in found]
            parts += [np.empty(0, kind)] * (self._width - len(parts))
            assert all(part.dtype == kind for part in parts), name
            self._write(name, parts)
        self._count += 1

    def _write(self, name: str, parts: Sequence[np.ndarray]) -> None:
        self._documents[name].add(parts)
        add_values(self._digest, parts)

    def _note_ids(self, ids: np.ndarray) -> None:
        self._largest_id = max(self._largest_id, int(ids.max(initial=-1)))

    def _pack(self, targets: SoftTargets) -> dict[str, np.ndarray]:
        """Turn the targets of a response into what the files hold."""
        if not self._fused:
            assert targets.values is not None
            return {VALUES_FILE: _half(targets.values)}
        self._note_ids(targets.ids)
        probs = np.concatenate([targets.probs, targets.tail[:, None]], axis=1).astype(np.float64)
        # Of sources rounded to float16 a row sums to 1.0003, and its highest log may be above 0.
        probs /= probs.sum(axis=1, keepdims=True)
        with np.errstate(divide="ignore"):
            logps = np.log(probs)
        return {
            "_ids": targets.ids,
            "_logps": _half(logps),
            "_sources": targets.sources,
            "_chunks": targets.chunks,
            "_chunk_logps": np.stack([targets.chunk_logps, targets.chunk_weights], axis=1),
        }

    def finish(self) -> dict[str, Any]:
        """Complete the data set and return its manifest."""
        for documents in self._documents.values():
            documents.close()
        manifest = {**self.fields, **FORMAT.fields, "count": self._count}
        manifest["targets_sha256"] = self._digest.hexdigest()
        manifest["largest_id"] = self._largest_id if self._fused else None
        FORMAT.write(self.prefix, manifest, self._files)
        self._files.publish()
        return manifest

    def discard(self) -> None:
        """Delete what was written."""
        for documents in self._documents.values():
            documents.abandon()
        self._files.discard()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Finish, or discard after an exception."""
        end_block(error, self.finish, self.discard)


def _half(values: np.ndarray) -> np.ndarray:
    """Return the bits of float16 numbers, uint16: log-probs below its range are those of 0."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).view(np.uint16)
