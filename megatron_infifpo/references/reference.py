"""Stored values of models, the way from their files to what a loss reads.

All that concerns one kind of values is here: how they are joined with the records (`open`), taken
for a pair (`take`), put into a row (`collate`) and read from it (`value`). The kind is a sum of
log-probs over the scored tokens of each response, with the number of tokens, of the initial pivot
and of M sources.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import SourcesConfig, check_accuracy, check_domains
from megatron_infifpo.tokens.dataset import TokenDataset


@dataclass(slots=True)
class PairValues:
    """The values of one record: R responses, M sources. Rows have them by these names.

    Attributes:
        initial_sum_logps: float32 `[R]`, over the scored tokens of the pivot; 0 where a response
            is absent.
        source_sum_logps: float32 `[R, M]`, 0 where masked or absent.
        source_token_counts: int64 `[R, M]`, then 1, so that a mean is always defined.
        source_mask: bool `[M]`, true where the source takes part.
        source_weights: float32 `[M + 1]`, of the sources and at last of the initial pivot.
        source_scales: float32 `[M + 1]`, the same of what standardises their values.
    """

    initial_sum_logps: np.ndarray
    source_sum_logps: np.ndarray
    source_token_counts: np.ndarray
    source_mask: np.ndarray
    source_weights: np.ndarray
    source_scales: np.ndarray


class Values(NamedTuple):
    """What a loss reads: sums or means of B pairs."""

    initial: Tensor
    """`[B, R]`"""
    sources: Tensor
    """`[B, R, M]`"""
    mask: Tensor
    """bool `[B, M]`, which source takes part."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Stored values of one model, of the N records of a token data set.

    Attributes:
        name: of the model, for metrics and reports.
        store: its log-probs.
        takes_part: bool `[N]`: the records of its domains that it has log-probs of.
    """

    name: str
    store: LogprobStore
    takes_part: np.ndarray

    @classmethod
    def open(
        cls,
        name: str,
        prefix: str,
        tokens: TokenDataset,
        *,
        domains: Sequence[str] | None = None,
        pivot: bool = False,
    ) -> Self:
        """Open a model's log-probs and check that they are of these records.

        Args:
            name: of the model.
            prefix: of the log-prob data set.
            tokens: the records, tokenized for the pivot.
            domains: the ones that the model takes part in; None means all.
            pivot: the model is the pivot, so every response has the same tokens there.

        Raises:
            UserError: they are broken or of other records.
        """
        store = LogprobStore(prefix)
        store.check_against(tokens, same_tokenizer=pivot)
        inside = np.array([domains is None or domain in domains for domain in tokens.domains])
        return cls(name, store, inside[tokens.domain_codes] & ~store.masked_records)

    def table(self, indices: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return sums, float64, and counts, int64, of K records, both `[K, R]`, 0 where absent.

        Args:
            indices: `[K]`.
            columns: `[K, R]`, which of a record's responses are taken, -1 for none.
        """
        rows = indices[:, None]
        sums, counts = self.store.all_sums[rows, columns], self.store.token_counts[rows, columns]
        absent = columns < 0
        return np.where(absent, 0.0, sums), np.where(absent, 0, counts).astype(np.int64)


class References:
    """The stored values of a run: the initial pivot's and the sources'.

    Attributes:
        initial: the initial pivot's.
        sources: the M sources', in the order of sources.yaml.
        weights: `[M + 1]`, of the sources and at last of the initial pivot.
        scales: `[M + 1]`, the same, what their values are standardised with; 1 until
            `standardise` is called, and always of the initial pivot.
        accuracies: `[D, M]`, of the sources in the records' domains, NaN where unknown.
        given_accuracies: by source, as sources.yaml has them; of those that have one.
    """

    def __init__(self, config: SourcesConfig, tokens: TokenDataset) -> None:
        """Open all of them.

        Raises:
            UserError: a data set is missing, broken or of other records, a domain is unknown, or
                misspelt where a source has an accuracy.
        """
        check_domains(config, tokens.domains)
        self.initial = Reference.open("initial", config.initial, tokens, pivot=True)
        self.sources = tuple(
            Reference.open(source.name, source.logprobs, tokens, domains=source.domains)
            for source in config.sources
        )
        self.weights = np.array(config.weights, np.float64)
        self.scales = np.ones_like(self.weights)
        for source, opened in zip(config.sources, self.sources, strict=True):
            codes = np.unique(tokens.domain_codes[opened.takes_part]).tolist()
            check_accuracy(source, [tokens.domains[code] for code in codes], config.path)
        known = [[source.accuracy_in(d) for source in config.sources] for d in tokens.domains]
        self.accuracies = np.array(known, np.float64).reshape(len(known), len(self.sources))
        self.given_accuracies = {
            source.name: source.accuracy for source in config.sources if source.accuracy is not None
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources."""
        return tuple(source.name for source in self.sources)

    def take(self, index: int, columns: np.ndarray) -> PairValues:
        """Return a record's values of R responses, in arrays of their own.

        Args:
            index: of the record.
            columns: `[R]`, which of its responses, -1 for none.
        """
        shape = (len(columns), len(self.sources))
        sums, counts = np.zeros(shape, np.float32), np.ones(shape, np.int64)
        mask = np.zeros(len(self.sources), bool)
        for column, source in enumerate(self.sources):
            if source.takes_part[index]:
                mask[column] = True
                sums[:, column] = source.store.all_sums[index][columns]
                counts[:, column] = source.store.token_counts[index][columns]
        initial = self.initial.store.all_sums[index][columns].astype(np.float32)
        absent = columns < 0
        if absent.any():  # the last response's values stand there
            initial[absent], sums[absent], counts[absent] = 0, 0, 1
        fixed = (each.astype(np.float32) for each in (self.weights, self.scales))
        return PairValues(initial, sums, counts, mask, *fixed)

    def table(self, indices: np.ndarray, columns: np.ndarray) -> dict[str, Tensor]:
        """Return the values of K records as a row has them of its pairs, but in float64.

        Beside them token_counts `[K, R]`: the pivot's scored tokens; and valid bool `[K, R]`.

        Args:
            indices: `[K]`.
            columns: `[K, R]`, which of a record's responses are taken, -1 for none.
        """
        initial, token_counts = self.initial.table(indices, columns)
        shape = (*initial.shape, len(self.sources))
        found = PairValues(
            initial,
            np.zeros(shape),
            np.ones(shape, np.int64),
            np.zeros((len(indices), len(self.sources)), bool),
            *(np.tile(each, (len(indices), 1)) for each in (self.weights, self.scales)),
        )
        for column, source in enumerate(self.sources):
            here = source.takes_part[indices]
            sums, counts = source.table(indices, columns)
            found.source_mask[:, column] = here
            found.source_sum_logps[here, :, column] = sums[here]
            found.source_token_counts[here, :, column] = counts[here].clip(1)
        row = {name: torch.from_numpy(getattr(found, name)) for name in _NAMES}
        row["token_counts"] = torch.from_numpy(token_counts)
        return row | {"valid": torch.from_numpy(columns >= 0)}


_NAMES = tuple(field.name for field in fields(PairValues))


def collate(pairs: Sequence[PairValues]) -> dict[str, Tensor]:
    """Return the values of B pairs by name, each with a first dimension of B."""
    return {
        name: torch.from_numpy(np.stack([getattr(pair, name) for pair in pairs])) for name in _NAMES
    }


def value(row: dict[str, Any], *, means: bool) -> Values:
    """Return what a loss reads of a row.

    Args:
        row: has what `collate` returns, and token_counts `[B, R]`.
        means: divide each model's sums by its own tokens.
    """
    initial, sources = row["initial_sum_logps"], row["source_sum_logps"]
    if means:
        initial = initial / row["token_counts"].clamp_min(1)  # 0 where a response is absent
        sources = sources / row["source_token_counts"]
    return Values(initial, sources, row["source_mask"])


def logprobs_identity(store: LogprobStore) -> dict[str, Any]:
    """What one model's log-probs are, and of which weights."""
    values = hashlib.sha256(store.all_sums.tobytes() + store.token_counts.tobytes())
    return {
        "weights_sha256": store.manifest["weights_sha256"],
        "dtype": store.manifest["dtype"],
        "logprobs_sha256": values.hexdigest(),
    }
