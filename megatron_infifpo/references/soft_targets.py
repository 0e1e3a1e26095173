"""Soft targets: for every scored token of the pivot, what fused sources say should stand there.

Row t is of scored token t itself: the distribution that predicts it. Beside the manifest,
PREFIX.json, lie Megatron's indexed files, one document a record and one sequence a response, as in
the token data set; empty where nothing was fused:

    PREFIX_ids          int32 [K, k]: ids of the pivot, -1 where there are fewer; an id <= -2 is
                        the group of ids -(id + 2)
    PREFIX_logps        float16 bits in uint16 [K, k + 1]: log-probs, and that of all other ids
    PREFIX_sources      uint8 [K]: 0 no target, m > 0 source m - 1, 255 several
    PREFIX_chunks       int32 [C, 2]: first and end of pivot tokens that are a source's chunk only
                        together, and
    PREFIX_chunk_logps  float32 [C, 2]: the source's log-prob of the chunk, and its weight
    PREFIX_groups       int32: the ids of each group, one document a group; or no file
    PREFIX_values       float16 bits in uint16 [K, M, k]: the sources' highest log-probs as they
                        are, NaN where one has no comparable row; in place of all files above
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.documents import Documents
from megatron_infifpo.storage.manifests import Format
from megatron_infifpo.tokens.dataset import TOKENIZER_SCHEMA, TokenDataset

MADE_BY = "infifpo fuse-targets"
FORMAT = Format(
    name="megatron_infifpo soft-target dataset",
    version=1,
    made_by=MADE_BY,
    schema={
        "count": int,
        "responses": [str],
        "fusion": str,
        "top_k": int,
        "sources": [str],
        "include_initial": bool,
        "ambiguous": (str, type(None)),
        "ce_per": (str, type(None)),
        "records_sha256": str,
        "tokens_sha256": str,
        "targets_sha256": str,
        "tokenizer": TOKENIZER_SCHEMA,
        "models": dict,
        "masked": dict,
        "coverage": dict,
        "versions": dict,
    },
)
VALUES = "none"
"""The fusion that fuses nothing: the sources' values alone are kept."""
GROUPED = "group"
"""Ids of a source that stand for several of the pivot's are kept as groups of those."""
SEVERAL = 255
ROUNDING = 0.02
"""How far from 1 the probabilities of a row may be, as float16 holds them."""
FILES: dict[str, type[np.number]] = {
    "_ids": np.int32,
    "_logps": np.uint16,
    "_sources": np.uint8,
    "_chunks": np.int32,
    "_chunk_logps": np.float32,
}
VALUES_FILE, GROUPS_FILE = "_values", "_groups"


def add_values(digest: Any, parts: Sequence[np.ndarray]) -> None:
    """Add to the hash of a data set what a document holds: first all groups, then the records.

    Args:
        digest: of hashlib.
        parts: the sequences of the document; of a record those of each file, in their order.
    """
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part).data)


@dataclass(slots=True)
class SoftTargets:
    """The soft targets of one response of K scored tokens.

    Attributes:
        ids: int32 `[K, k]`, of the pivot, -1 for none; an id <= -2 is the group -(id + 2).
        probs: float32 `[K, k]`, 0 where there is no id.
        tail: float32 `[K]`, of all other ids: with probs it sums to 1; 1 where there is no target.
        sources: uint8 `[K]`: 0 no target, m > 0 source m - 1, 255 several.
        chunks: int32 `[C, 2]`, first and end of the tokens of chunks that are not one to one.
        chunk_logps: float32 `[C]`, a source's log-prob of each chunk.
        chunk_weights: float32 `[C]`, of the source.
        values: float32 `[K, M, k]`, the sources' own highest log-probs, descending, NaN where one
            has no comparable row; None where sources are fused.
    """

    ids: np.ndarray
    probs: np.ndarray
    tail: np.ndarray
    sources: np.ndarray
    chunks: np.ndarray
    chunk_logps: np.ndarray
    chunk_weights: np.ndarray
    values: np.ndarray | None = None


class SoftTargetStore:
    """Reads a soft-target data set; opening does not loop over the records.

    Attributes:
        manifest: the content of `PREFIX.json`.
        fusion: how sources were fused, or "none".
        top_k: ids of a row.
        sources: names of the M sources, "initial" of the initial pivot.
        groups: ids of each group; None where there are no groups.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Open a data set.

        Raises:
            UserError: a file is missing, truncated or of another format.
        """
        self.prefix = str(prefix)
        self.manifest = FORMAT.read(prefix)
        self.fusion: str = self.manifest["fusion"]
        self.top_k: int = self.manifest["top_k"]
        self.sources = tuple(self.manifest["sources"])
        self._fused = self.fusion != VALUES
        self.groups = self._read_groups()

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of all that is stored."""
        return self.manifest["targets_sha256"]

    @property
    def _again(self) -> str:
        return f"write it again with {MADE_BY}"

    def __len__(self) -> int:
        """Return the number of records."""
        return self.manifest["count"]

    @cached_property
    def _files(self) -> dict[str, Documents]:
        width = len(self.manifest["responses"])
        kinds = FILES if self._fused else {VALUES_FILE: np.uint16}
        found = {name: Documents(self.prefix + name, kind, width) for name, kind in kinds.items()}
        count = self.manifest["count"]  # not len(self): a damaged one may be no length at all
        for name, documents in found.items():
            if len(documents) != count:
                raise UserError(
                    f"{self.prefix}{name}.idx holds {len(documents)} records, expected {count} "
                    f"by {self.prefix}.json; {self._again}"
                )
        return found

    def _read_groups(self) -> list[np.ndarray] | None:
        if self.manifest["ambiguous"] != GROUPED:
            return None
        documents = Documents(self.prefix + GROUPS_FILE, np.int32, 1)
        return [documents.document(index) for index in range(len(documents))]

    def largest_id(self) -> int | None:
        """Return the largest id of targets and groups, -1 without any; None where none are fused.

        Without the manifest's it takes one pass over the mapped file.
        """
        if not self._fused:
            return None
        known = self.manifest.get("largest_id")
        if isinstance(known, int):
            return known
        ids = self._files["_ids"]
        parts = [*(self.groups or ()), *(ids.view(index) for index in range(len(ids)))]
        return max((int(part.max(initial=-1)) for part in parts), default=-1)

    def check_against(self, tokens: TokenDataset) -> None:
        """Check that these are targets of a token data set's tokens.

        Raises:
            UserError: the count, the responses, or the fingerprint of records or of tokens
                disagrees; says which.
        """
        found = {
            "number of records": (self.manifest["count"], len(tokens)),
            "list of responses": (self.manifest["responses"], list(tokens.responses)),
            "fingerprint of the records": (self.manifest["records_sha256"], tokens.records_sha256),
            "fingerprint of the tokens": (
                self.manifest["tokens_sha256"],
                tokens.manifest["tokens_sha256"],
            ),
        }
        for name, (here, there) in found.items():
            if here != there:
                raise UserError(
                    f"the soft targets {self.prefix} do not fit {tokens.prefix}: the {name} is "
                    f"{_short(here)}, expected {_short(there)}; fuse them again with {MADE_BY} "
                    f"--data {tokens.prefix}"
                )

    def take(self, index: int, response: int, length: int, *, check: bool = True) -> SoftTargets:
        """Return the soft targets of one response, in arrays of their own.

        Args:
            index: of the record.
            response: which of its responses.
            length: scored tokens of the pivot in it.
            check: refuse what are no probabilities; else the caller does, and says where.

        Raises:
            UserError: the data set has another number of tokens there, or no probabilities.
        """
        parts = {name: d.sequences(index)[response] for name, d in self._files.items()}
        first = parts["_sources"] if self._fused else parts[VALUES_FILE]
        if not len(first):
            return self._nothing(length)
        shapes = {
            "_ids": (length, self.top_k),
            "_logps": (length, self.top_k + 1),
            "_sources": (length,),
            "_chunks": (-1, 2),
            "_chunk_logps": (-1, 2),
            VALUES_FILE: (length, len(self.sources), self.top_k),
        }
        try:
            shaped = {name: part.reshape(shapes[name]) for name, part in parts.items()}
        except ValueError:
            raise UserError(
                f"{self.prefix}: record {index} has targets of another number of tokens than the "
                f"{length} of response {response}; {self._again}"
            ) from None
        if not self._fused:
            targets = self._nothing(length)
            targets.values = shaped[VALUES_FILE].view(np.float16).astype(np.float32)
            self._require(not check or not (targets.values > 0).any(), index)
            return targets
        with np.errstate(over="ignore", invalid="ignore"):
            probs = np.exp(shaped["_logps"].view(np.float16).astype(np.float64))
            mass, chunk_logps = probs.sum(axis=1, keepdims=True), shaped["_chunk_logps"]
            fine = (np.abs(mass - 1) <= ROUNDING).all() and (chunk_logps[:, 0] <= ROUNDING).all()
            self._require(not check or bool(fine), index)
            probs /= mass  # rounded to float16, log-probs no longer sum to 1
        return SoftTargets(
            ids=shaped["_ids"],
            probs=probs[:, :-1].astype(np.float32),
            tail=probs[:, -1].astype(np.float32),
            sources=shaped["_sources"],
            chunks=shaped["_chunks"],
            chunk_logps=chunk_logps[:, 0].copy(),
            chunk_weights=chunk_logps[:, 1].copy(),
        )

    def _require(self, holds: bool, index: int) -> None:
        """Refuse what cannot have been written."""
        if not holds:
            raise UserError(
                f"{self.prefix}: the soft targets of record {index} are no probabilities: the "
                f"files were changed or damaged; infifpo check names the place, {self._again}"
            )

    def _nothing(self, length: int) -> SoftTargets:
        """Return what a response without targets has."""
        k = self.top_k if self._fused else 0
        shape = (length, len(self.sources), self.top_k)
        return SoftTargets(
            ids=np.full((length, k), -1, np.int32),
            probs=np.zeros((length, k), np.float32),
            tail=np.ones(length, np.float32),
            sources=np.zeros(length, np.uint8),
            chunks=np.zeros((0, 2), np.int32),
            chunk_logps=np.zeros(0, np.float32),
            chunk_weights=np.zeros(0, np.float32),
            values=None if self._fused else np.full(shape, np.nan, np.float32),
        )


def _short(value: Any) -> str:
    """Show a value of a manifest; of a hash its first characters."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
