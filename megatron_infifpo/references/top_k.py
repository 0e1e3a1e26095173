"""What a log-prob dataset that was scored with `--top-k` has beside its log-probs.

    PREFIX_topk_ids.bin, .idx     int32 [L, k] of each response: token ids of the model's own, the
                                  most probable first
    PREFIX_topk_logps.bin, .idx   uint16, the bits of float16 [L, k + 1]: their log-probs, and the
                                  log of what is left for all other tokens (the tail)
    PREFIX_bytes.bin, .idx        uint16 [L]: the bytes of each scored token; 0 of special ones
    PREFIX_texts.npy              [N, R] of `TEXT`: which text these bytes are, joined

Row t is the distribution that predicts scored token t, at temperature 1. Log-probs and not
probabilities: those underflow in float16. The tail is computed before rounding, and -inf where the
k log-probs are all there is, as far as float32 can tell (masses below some 1e-7 are noise).
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.aside import Aside
from megatron_infifpo.storage.documents import (
    Documents,
    DocumentWriter,
    read_array,
    write_array,
)
from megatron_infifpo.storage.manifests import check_fields

SCHEMA = {"k": int, "responses": str, "vocab_size": int, "end_of_turn_ids": [int]}
_DOCUMENTS: dict[str, type[np.number]] = {
    "_topk_ids": np.int32,
    "_topk_logps": np.uint16,
    "_bytes": np.uint16,
}
FILES = (*(name + end for name in _DOCUMENTS for end in (".bin", ".idx")), "_texts.npy")

TEXT = np.dtype([("whole", "u8"), ("inner", "u8"), ("lead", "u4"), ("trail", "u4")])
"""Which bytes a response's scored tokens are: their hash, that of them without white space at both
ends, and how many bytes of it there are."""

_MOST = 2**20  # larger than any vocabulary
_LOWEST = np.float32(np.finfo(np.float16).min)
# log-softmax in float32 may round up to just above 0; more than this is a defect.
ROUNDING = 1e-5


class TopK(NamedTuple):
    """The most probable tokens at each scored token of a response.

    Attributes:
        ids: int32 `[L, k]`, the most probable first.
        logps: float32 `[L, k]`.
        tail: float32 `[L]`, log of the mass of all other tokens.
    """

    ids: np.ndarray
    logps: np.ndarray
    tail: np.ndarray


class Packed(NamedTuple):
    """One response as it is stored.

    Attributes:
        ids: int32 `[L, k]`; `[0, k]` of a response whose distributions are not kept.
        logps: uint16 `[L, k + 1]`, or `[0, k + 1]`: `pack_logps`.
        lengths: uint16 `[L]`, bytes of each token.
        text: `text_identity` of these bytes.
    """

    ids: np.ndarray
    logps: np.ndarray
    lengths: np.ndarray
    text: tuple[int, int, int, int]


def text_identity(content: bytes) -> tuple[int, int, int, int]:
    """Return what `TEXT` holds of a text: of bytes, which may end within a character."""
    inner = content.strip()
    lead = len(content) - len(content.lstrip())
    return _hash(content), _hash(inner), lead, len(content) - lead - len(inner)


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def pack_logps(logps: np.ndarray) -> np.ndarray:
    """Return float16 bits, uint16 `[L, k + 1]`, of float32 log-probs `[L, k]` and their tail's.

    A log-prob below what float16 holds becomes its lowest number. One that is no log-prob stays so,
    for `TopKWriter` to refuse.
    """
    mass = np.exp(logps, dtype=np.float64).sum(axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log1p(-mass.clip(0.0, 1.0))
    held = np.where(logps > ROUNDING, logps, np.minimum(logps, 0.0)).clip(_LOWEST)
    return np.column_stack([held, tail]).astype(np.float16).view(np.uint16)


def unpack_logps(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return float32 log-probs `[L, k]` and the log of the tail's mass `[L]`."""
    values = packed.view(np.float16).astype(np.float32)
    return values[:, :-1], values[:, -1]


def covered_mass(found: Sequence[Packed]) -> tuple[float, int]:
    """Return the mass of the k most probable tokens, added up over tokens, and how many these are.

    Args:
        found: a record's responses.
    """
    tails = [unpack_logps(response.logps)[1] for response in found]
    mass = sum(float(-np.expm1(tail, dtype=np.float64).sum()) for tail in tails)
    return mass, sum(map(len, tails))


class TopKWriter:
    """Writes these files; its owner publishes them."""

    def __init__(self, prefix: str, fields: dict[str, Any], width: int, files: Aside) -> None:
        """Open the files aside.

        Args:
            prefix: of the dataset.
            fields: `top_k` of its manifest.
            width: responses of a record, at most.
            files: publishes or discards them.
        """
        check_fields(fields, SCHEMA, "top_k")
        self._prefix, self._k, self._width, self._files = prefix, fields["k"], width, files
        self._documents = [
            DocumentWriter(prefix + name, dtype, files) for name, dtype in _DOCUMENTS.items()
        ]
        self._texts = bytearray()

    def add(self, record_id: str, found: Sequence[Packed], counts: Sequence[int]) -> None:
        """Append a record.

        Args:
            record_id: for errors.
            found: one entry a response.
            counts: their scored tokens.
        """
        kept = [len(response.ids) for response in found]
        lengths = [len(response.lengths) for response in found]
        fits = lengths == list(counts) and all(
            n in (0, count) and r.ids.shape == (n, self._k) and r.logps.shape == (n, self._k + 1)
            for r, n, count in zip(found, kept, counts, strict=True)
        )
        if not fits:
            raise ValueError(
                f"record {record_id!r}: {kept} distributions over {self._k} tokens and {lengths} "
                f"lengths, expected {list(counts)} (no distributions where they are not kept)"
            )
        if not all((r.logps.view(np.float16) <= 0).all() for r in found):
            raise UserError(
                f"record {record_id!r}: a log-prob of its {self._k} most probable tokens is NaN or "
                "above 0; the model's weights or its dtype are at fault"
            )
        self._documents[0].add([r.ids.astype(np.int32).ravel() for r in found])
        self._documents[1].add([r.logps.ravel() for r in found])
        self._documents[2].add([r.lengths for r in found])
        row = np.zeros(self._width, TEXT)
        row[: len(found)] = [r.text for r in found]
        self._texts += row.tobytes()

    def mask(self) -> None:
        """Append a record without tokens."""
        for documents, dtype in zip(self._documents, _DOCUMENTS.values(), strict=True):
            documents.add([np.empty(0, dtype)] * self._width)
        self._texts += np.zeros(self._width, TEXT).tobytes()

    def close(self) -> None:
        """Complete the files, still aside."""
        for documents in self._documents:
            documents.close()
        texts = np.frombuffer(self._texts, TEXT).reshape(-1, self._width)
        write_array(f"{self._prefix}_texts.npy", texts, self._files)

    def abandon(self) -> None:
        """Close what is not to be completed."""
        for documents in self._documents:
            documents.abandon()


class TopKFiles:
    """Reads these files, each when it is first asked for.

    Attributes:
        k: tokens of a distribution.
        responses: "all", or "chosen": the other responses have no distributions.
    """

    def __init__(self, prefix: str, counts: np.ndarray, fields: Any, *, listed: bool) -> None:
        """Look at the manifest.

        Args:
            prefix: of the dataset.
            counts: `[N, R]` scored tokens.
            fields: `top_k` of its manifest.
            listed: records may have fewer than R responses.

        Raises:
            UserError: these are not the fields of `top_k`.
        """
        check_fields(fields, SCHEMA, f"the manifest {prefix}.json: top_k")
        self.k, self.responses = fields["k"], fields["responses"]
        if not 0 < self.k <= _MOST:
            raise UserError(
                f"the manifest {prefix}.json: top_k: k is {self.k}, expected 1 to {_MOST}: write "
                "it again"
            )
        self._prefix, self._counts, self._listed = prefix, counts, listed

    def open_all(self) -> None:
        """Open every file."""
        _ = self._ids, self._logps, self._lengths, self.texts

    def top(self, index: int, response: int) -> TopK:
        """Return the distributions of one response, `[0, k]` where none are kept.

        Raises:
            UserError: the files are missing or broken.
        """
        ids = self._ids.sequences(index)[response].reshape(-1, self.k)
        packed = self._logps.sequences(index)[response].reshape(-1, self.k + 1)
        return TopK(ids, *unpack_logps(packed))

    def byte_lengths(self, index: int, response: int) -> np.ndarray:
        """Return the bytes of each scored token of a response, uint16 `[L]`."""
        return self._lengths.sequences(index)[response]

    @cached_property
    def texts(self) -> np.ndarray:
        """Which text each response is, `[N, R]` of `TEXT`; zeros where there is none."""
        path = f"{self._prefix}_texts.npy"
        found = read_array(path, f"write {self._prefix} again", mapped=True)
        if found.dtype != TEXT or found.shape != self._counts.shape:
            raise UserError(
                f"{path} holds {found.dtype} {list(found.shape)}, expected the identities of "
                f"{list(self._counts.shape)} texts; write {self._prefix} again"
            )
        return found

    @cached_property
    def _ids(self) -> Documents:
        return self._open("_topk_ids", self._kept * self.k)

    @cached_property
    def _logps(self) -> Documents:
        return self._open("_topk_logps", self._kept * (self.k + 1))

    @cached_property
    def _lengths(self) -> Documents:
        return self._open("_bytes", self._counts)

    @property
    def _kept(self) -> np.ndarray:
        """Scored tokens whose distributions are kept, int64 `[N, R]`."""
        kept = self._counts.astype(np.int64)
        if self.responses != "all":
            kept[:, 1:] = 0
        return kept

    def _open(self, name: str, expected: np.ndarray) -> Documents:
        prefix, width = self._prefix + name, self._counts.shape[1]
        found = Documents(prefix, _DOCUMENTS[name], width, fewer=self._listed)
        if not np.array_equal(found.lengths, expected):
            raise UserError(
                f"{prefix}.idx and {self._prefix}_counts.npy disagree about the number of tokens; "
                f"write {self._prefix} again with infifpo score --top-k {self.k}"
            )
        return found
