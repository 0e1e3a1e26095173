"""Megatron's indexed format with a known number of sequences a document, or fewer.

A thin layer over `megatron.core.datasets.indexed_dataset`: it turns what a broken file does to
Megatron's reader (assertions, crashes) into one sentence.
"""

import contextlib
import os
import struct
import tokenize
from collections.abc import Sequence

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu
from megatron_infifpo.storage.aside import Aside

cpu.before_megatron()

from megatron.core.datasets.indexed_dataset import (  # noqa: E402
    IndexedDataset,
    IndexedDatasetBuilder,
)


class DocumentWriter:
    """Writes `PREFIX.bin` and `PREFIX.idx`."""

    def __init__(self, prefix: str, dtype: type[np.number], files: Aside) -> None:
        """Open the two files aside.

        Args:
            prefix: of the files.
            dtype: of their items.
            files: publishes or discards them, after `close`.
        """
        self._index = str(files.path(f"{prefix}.idx"))
        self._builder = IndexedDatasetBuilder(str(files.path(f"{prefix}.bin")), dtype=dtype)

    def add(self, sequences: Sequence[np.ndarray]) -> None:
        """Append a document of these sequences; a sequence may be empty."""
        self._builder.add_document(np.concatenate(sequences), [len(s) for s in sequences])

    def close(self) -> None:
        """Complete both files, still aside."""
        self._builder.finalize(self._index)

    def abandon(self) -> None:
        """Close what is not to be completed."""
        with contextlib.suppress(OSError):  # on a full disk closing fails as writing has
            self._builder.data_file.close()


class Documents:
    """Reads documents of `width` sequences each, memory-mapped.

    Attributes:
        lengths: int32 `[N, width]`, items of each sequence; 0 where a document has fewer.
    """

    def __init__(
        self, prefix: str, dtype: type[np.number], width: int, *, fewer: bool = False
    ) -> None:
        """Open and check the two files; no loop over the documents.

        Args:
            prefix: of the files.
            dtype: of their items.
            width: sequences of a document.
            fewer: a document may have fewer, but one.

        Raises:
            UserError: a file is missing, truncated, of another type or of another width.
        """
        for end in (".bin", ".idx"):
            if not os.path.isfile(prefix + end):
                raise UserError(f"{prefix}{end} is missing, expected it beside the manifest; write "
                                f"{prefix} again")  # fmt: skip
        _check_index_size(f"{prefix}.idx")
        size = os.path.getsize(f"{prefix}.bin")
        # An empty file cannot be mapped: every record of a source may be masked.
        try:
            self._dataset = IndexedDataset(prefix, mmap=size > 0)
        except AssertionError:
            raise UserError(f"{prefix}.idx contradicts itself: write it again") from None
        index = self._dataset.index
        if index.dtype != dtype:
            raise UserError(
                f"{prefix}.idx holds {np.dtype(index.dtype)} values, expected {np.dtype(dtype)}; "
                "this is another kind of dataset"
            )
        borders = np.array(self._dataset.document_indices)
        counts = np.diff(borders)
        if (counts > width).any() or (counts < (1 if fewer else width)).any() or borders[0] != 0:
            raise UserError(
                f"{prefix}.idx holds documents of other than {width} sequences, expected one for "
                "each response (and the prompt) of a record"
            )
        # Copies: Megatron unmaps the index when the dataset goes, and views would dangle.
        self.lengths: np.ndarray = np.zeros((len(counts), width), np.int32)
        self.lengths[np.arange(width) < counts[:, None]] = index.sequence_lengths
        self._starts: np.ndarray = np.array(index.sequence_pointers)[borders[:-1]]
        self._sizes: np.ndarray = self.lengths.sum(axis=1, dtype=np.int64)
        self._dtype, self._prefix = dtype, prefix
        sequences = index.sequence_lengths.astype(np.int64)
        starts = (np.cumsum(sequences) - sequences) * np.dtype(dtype).itemsize
        if (sequences < 0).any() or not np.array_equal(starts, index.sequence_pointers):
            raise UserError(f"{prefix}.idx has sequences out of place: write it again")
        expected = int(self._sizes.sum()) * np.dtype(dtype).itemsize
        if size != expected:
            raise UserError(
                f"{prefix}.bin has {size} bytes, expected {expected} by {prefix}.idx; the file is "
                "truncated or belongs to another index: write it again"
            )

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self._sizes)

    def view(self, index: int) -> np.ndarray:
        """Return all sequences of one document, joined: read-only, void once this object goes."""
        count = int(self._sizes[index])
        if count == 0:
            return np.empty(0, dtype=self._dtype)
        return self._dataset.bin_reader.read(self._dtype, count, int(self._starts[index]))

    def document(self, index: int) -> np.ndarray:
        """Return all sequences of one document, joined, as an array of its own (writable)."""
        return self.view(index).copy()

    def sequences(self, index: int) -> list[np.ndarray]:
        """Return the sequences of one document; they share one writable array of its own."""
        document, start, parts = self.document(index), 0, []
        for length in self.lengths[index].tolist():
            parts.append(document[start : start + length])
            start += length
        return parts

    def largest(self) -> int:
        """Return the largest item, or complement of a negative one; -1 where there is none."""
        total = int(self._sizes.sum())
        if total == 0:
            return -1
        values = self._dataset.bin_reader.read(self._dtype, total, 0)
        return max(int(values.max()), -1 - int(values.min()))

    def find(self, content: np.ndarray) -> int | None:
        """Return the first document equal to `content`, if any (vectorised scan)."""
        if len(content) == 0:
            return None
        candidates = np.flatnonzero(self._sizes == len(content))
        starts = self._starts[candidates] // np.dtype(self._dtype).itemsize
        total = int(self._sizes.sum())
        values = self._dataset.bin_reader.read(self._dtype, total, 0) if total else content
        for offset, wanted in enumerate(content):
            keep = values[starts + offset] == wanted
            candidates, starts = candidates[keep], starts[keep]
        return int(candidates[0]) if len(candidates) else None


# The format's magic bytes and version, and the codes of its types.
_INDEX_HEADER = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1)
_DTYPE_CODES = range(1, 9)


def read_array(path: str, again: str, *, mapped: bool = False) -> np.ndarray:
    """Read an `.npy` file.

    Raises:
        UserError: it is missing or broken.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError) as error:
        raise UserError(f"cannot read {path} ({error}); {again}") from None
    return array


def write_array(path: str, values: np.ndarray, files: Aside) -> None:
    """Write an `.npy` file aside; `files` publish it."""
    with open(files.path(path), "wb") as stream:
        np.save(stream, values)


def _check_index_size(path: str) -> None:
    """Refuse an index that is no index, or truncated: Megatron's reader would crash on it."""
    with open(path, "rb") as stream:
        header = stream.read(34)
    if len(header) < 34 or header[:17] != _INDEX_HEADER or header[17] not in _DTYPE_CODES:
        raise UserError(f"{path} is not an index of Megatron's indexed format; write it again")
    sequences, borders = struct.unpack("<QQ", header[18:34])
    expected = 34 + 12 * sequences + 8 * borders
    if os.path.getsize(path) != expected:
        raise UserError(
            f"{path} has {os.path.getsize(path)} bytes, expected {expected} by its header; the "
            "file is truncated: write it again"
        )
