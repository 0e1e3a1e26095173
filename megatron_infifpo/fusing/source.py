"""A source, opened for fusing: what it says of a response, or why it takes no part."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.fusing.align import Response, align_response, same_tokenizer
from megatron_infifpo.fusing.fuse import Candidate
from megatron_infifpo.fusing.vocabulary import Vocabulary, VocabularyMap, map_vocabulary
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.reference import Reference, logprobs_identity
from megatron_infifpo.references.soft_targets import GROUPED
from megatron_infifpo.references.sources import Source
from megatron_infifpo.storage.notes import parse_ranges
from megatron_infifpo.tokens.dataset import TokenDataset

OUTSIDE = "outside its domains"
MASKED = "masked in its log-probs"
OTHER_TEXT = "its text is not the pivot's, byte for byte"


@dataclass(frozen=True)
class Found:
    """What a source says of a response.

    Attributes:
        candidate: in the pivot's ids.
        nats: minus the log-prob of the response.
        units: its bytes, or the source's tokens.
    """

    candidate: Candidate
    nats: float
    units: int


class FusingSource:
    """One source.

    Attributes:
        name: of the source; "initial" of the initial pivot.
        number: among all sources.
        weight: its share in a mean.
        store: its log-probs.
        map: of its ids onto the pivot's; each onto itself until `map_ids`.
    """

    def __init__(
        self,
        source: Source,
        reference: Reference,
        tokens: TokenDataset,
        *,
        number: int,
        per_byte: bool,
        pivot: bool,
    ) -> None:
        """Take a source.

        Args:
            source: its entry in sources.yaml.
            reference: its log-probs, joined with the records.
            tokens: the records, tokenized for the pivot.
            number: among all sources.
            per_byte: cross-entropies are by bytes, else by the source's tokens.
            pivot: it is the initial pivot, so its tokens are the pivot's.
        """
        self.name, self.number, self.weight = source.name, number, source.weight
        self._domains = source.domains
        self.store: LogprobStore = reference.store
        self._takes_part, self._per_byte, self._pivot = reference.takes_part, per_byte, pivot
        self._same_ids = same_tokenizer(self.store.manifest, tokens.manifest)
        self._starts_suffice = False
        # One without distributions is refused by `check`.
        size = self.store.manifest["top_k"]["vocab_size"] if self.store.top_k else 0
        self.map = VocabularyMap(np.arange(size, dtype=np.int32), [], {})

    def check(self, top_k: int | None, *, listed: bool) -> None:
        """Check that it has the top-k that is asked for.

        Raises:
            UserError: it has none, or of too few tokens or responses.
        """
        again = "score it again with infifpo score --top-k"
        if self.store.top_k is None:
            raise UserError(
                f"{self.store.prefix} ({self.name}) has no distributions over tokens, expected the "
                f"most probable ones of each; {again} K"
            )
        if top_k is not None and self.store.top_k < top_k:
            raise UserError(
                f"{self.store.prefix} ({self.name}) has the {self.store.top_k} most probable "
                f"tokens of each, expected {top_k} by --top-k; {again} {top_k}, or ask for fewer"
            )
        if listed and self.store.manifest["top_k"]["responses"] != "all":
            raise UserError(
                f"{self.store.prefix} ({self.name}) has distributions of a list's first response "
                f"alone, expected them of all responses; {again} {self.store.top_k} "
                "--top-k-responses all"
            )

    def map_ids(self, own: Vocabulary, pivot: Vocabulary, ambiguous: str) -> None:
        """Map its ids onto the pivot's.

        Args:
            own: its vocabulary.
            pivot: the pivot's.
            ambiguous: one of `vocabulary.AMBIGUOUS`.
        """
        size = self.store.manifest["top_k"]["vocab_size"]
        self.map = map_vocabulary(own, pivot, size, ambiguous)
        self._starts_suffice = ambiguous == GROUPED

    @cached_property
    def _texts(self) -> np.ndarray:
        # A plain array: each look into a mapped one makes another, slowly.
        return np.array(self.store.texts)

    @cached_property
    def _notes(self) -> tuple[np.ndarray, list[str]]:
        """What its manifest says of records: which text, and the texts."""
        texts, which = [""], np.zeros(len(self.store), np.int16)
        for text, ranges in self.store.manifest["notes"].items():
            for part in parse_ranges(ranges):
                which[part.start : part.stop] = len(texts)
            texts.append(text)
        return which, texts

    def take(self, index: int, response: int, pivot: Response) -> Found | str:
        """Return what it says of a response, or why it takes no part.

        Args:
            index: of the record.
            response: which of its responses.
            pivot: the pivot's tokens.
        """
        which, texts = self._notes
        note = texts[which[index]]
        if not self._takes_part[index]:
            return (note or MASKED) if self.store.masked(index) else OUTSIDE
        lengths = self.store.byte_lengths(index, response).astype(np.int64)
        text = [int(part) for part in self._texts[index, response]]
        own = Response(lengths, *text)
        alignment = align_response(
            pivot,
            own,
            is_pivot=self._pivot,
            same_ids=self._same_ids,
            starts_suffice=self._starts_suffice,
        )
        if alignment is None:
            return note or OTHER_TEXT  # of a record that was cut the note says so
        ids, logps, tail = self.store.top(index, response)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.map.ids):
            raise UserError(
                f"{self.store.prefix}: record {index} has token ids {ids.min()} to {ids.max()}, "
                f"expected them from 0 to {len(self.map.ids) - 1}: the file was changed or "
                "damaged; score it again"
            )
        values = self.store.logprobs(index, response).astype(np.float64)
        nats, units = -float(values.sum()), int(lengths.sum()) if self._per_byte else len(values)
        at, until = alignment.source_rows, np.concatenate([[0.0], np.cumsum(values)])
        first, end = alignment.source_chunks.T
        candidate = Candidate(
            number=self.number,
            weight=self.weight,
            cross_entropy=nats / max(units, 1),
            rows=alignment.rows,
            ids=self.map.ids[ids[at]],
            probs=np.exp(logps[at].astype(np.float64)),
            tail=np.exp(tail[at].astype(np.float64)),
            values=logps[at],
            chunks=alignment.chunks,
            chunk_logps=until[end] - until[first],
        )
        return Found(candidate, nats, units)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest says of it: whose log-probs these are, and where they lie."""
        manifest, store = self.store.manifest, self.store
        names = ("model", "backend", "tokenizer")
        return {name: manifest[name] for name in names} | {
            **logprobs_identity(store),
            "logprobs": store.prefix,
            "top_k": store.top_k,
            "weight": self.weight,
            "domains": self._domains and list(self._domains),
        }
