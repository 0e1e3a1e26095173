"""Join of the pivot's tokens with the log-probs of the initial pivot and of every source."""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.reference import PairValues, References
from megatron_infifpo.references.soft_targets import SoftTargets, SoftTargetStore
from megatron_infifpo.references.sources import SourcesConfig
from megatron_infifpo.rows.choice import choose
from megatron_infifpo.rows.layout import PLAIN, RowLayout
from megatron_infifpo.rows.learnt import open_targets
from megatron_infifpo.rows.weighing import standardise, weigh_pairs
from megatron_infifpo.storage.notes import counted
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.lengths import by_domain


@dataclass(slots=True)
class PreferencePair:
    """One record, ready to be packed. R responses: as many as the method compares.

    Attributes:
        index: of the record in the token dataset.
        prompt_ids: int32 `[P]`.
        response_ids: R arrays of int32, end of turn included; empty, at the end, where there are
            fewer responses.
        domain_code: index into `PreferenceDataset.domains`.
        values: what is stored of models; None where no sources were given.
        scored: R arrays of bool, which tokens of `response_ids` are scored; None: all of them.
        rewards: float64 `[R]`, the responses' scores, 0 where there is none; None without any.
        targets: soft targets of the first response; None without any.
        groups: groups of ids that the targets name; None without any.
        weight: of its loss; None: all are 1.
    """

    index: int
    prompt_ids: np.ndarray
    response_ids: tuple[np.ndarray, ...]
    domain_code: int = 0
    values: PairValues | None = None
    scored: tuple[np.ndarray, ...] | None = None
    rewards: np.ndarray | None = None
    targets: SoftTargets | None = None
    groups: list[np.ndarray] | None = None
    weight: float | None = None


_NONE, _NO_MARK = np.empty(0, np.int32), np.empty(0, bool)


class PreferenceDataset:
    """Pairs by record index.

    Attributes:
        tokens: the token dataset.
        references: stored values of the initial pivot and of the sources; None without sources.
        domains: names by domain code.
        domain_codes: int64 `[N]`, of the records.
        columns: int16 `[N, R]`, which responses of a record are used, see `choice.Choice`.
        lacking: bool `[N]` by reason: records that have not enough of them.
        rewards: float64 `[N, R]`, scores of the used responses, 0 where there is none; None
            without any.
        targets: soft targets of the records' tokens; None without any.
        pair_weights: float64 `[N]`, of the records' losses; None: all are 1.
        hands_out_targets: pairs have theirs; only the last pipeline stage needs them.
        responses: R, at most so many are.
        segment_lengths: int64 `[N]`, tokens of the longest response with its prompt; 0 where the
            record is masked.
    """

    def __init__(
        self,
        token_prefix: str | Path,
        sources: SourcesConfig | None = None,
        *,
        require_sources: bool = False,
        responses: int | None = None,
        rewards: bool = False,
    ) -> None:
        """Open all datasets and check that they belong together.

        Args:
            token_prefix: of the token dataset.
            sources: the log-prob datasets; None gives tokens only (SFT, scoring).
            require_sources: refuse a configuration that lists no source.
            responses, rewards: which responses are used, see `choice.choose`; default: all that
                the records have.

        Raises:
            UserError: a dataset is missing, broken or of other records, a domain is unknown, or
                the records have fewer responses or no scores.
        """
        self.tokens = TokenDataset(token_prefix)
        choice = choose(self.tokens, responses, rewards=rewards)
        self.columns, self.lacking = choice.columns, choice.obstacles
        self.responses = self.columns.shape[1]
        self.rewards = self._used_rewards()
        self.domains = self.tokens.domains
        self.domain_codes = self.tokens.domain_codes.astype(np.int64)
        if require_sources and (sources is None or not sources.sources):
            where = "sources.yaml" if sources is None else sources.path
            raise UserError(
                f"{where} lists no source, expected at least one under the key sources for a fused "
                "reference or weights of pairs"
            )
        self.references = None if sources is None else References(sources, self.tokens)
        self.targets: SoftTargetStore | None = None
        self.pair_weights: np.ndarray | None = None
        self.hands_out_targets = True
        prompts = self.tokens.prompt_lengths.astype(np.int64)
        lengths = np.take_along_axis(self.tokens.response_lengths, self.columns, axis=1)
        lengths = np.where(self.columns < 0, 0, lengths).astype(np.int64)
        self._response_tokens = lengths.sum(axis=1)
        self._response_counts = (lengths > 0).sum(axis=1)
        self.segment_lengths = prompts + lengths.max(axis=1)

    @classmethod
    def for_method(
        cls,
        method: Method,
        token_prefix: str | Path,
        sources: SourcesConfig | None,
        *,
        soft_targets: str | Path | None = None,
    ) -> Self:
        """Open what a method is trained on; see `__init__`.

        Args:
            method: that is trained.
            token_prefix, sources: see `__init__`.
            soft_targets: prefix of soft targets of these tokens.

        Raises:
            UserError: as there, lists are longer than the method's loss takes, or soft targets are
                of other tokens or not what the method learns from, or the method weighs pairs by
                accuracies that sources.yaml does not have.
        """
        found = cls(
            token_prefix,
            sources,
            require_sources=sources is not None and method.reads_sources,
            responses=method.responses,
            rewards="rewards" in method.reads,
        )
        most = method.most_responses
        if most is not None and found.responses > most:
            raise UserError(
                f"{token_prefix} has lists of {found.responses} responses, expected at most {most} "
                f"for --objective {method.objective} with these options"
            )
        if soft_targets is not None:
            found.targets = open_targets(method, soft_targets, found.tokens)
        if found.references is not None:
            found._take_constants(method, found.references)
        return found

    def _take_constants(self, method: Method, references: References) -> None:
        """Compute what the method takes from all records at once."""
        if method.pair_weights is not None:
            pairs = choose(self.tokens, 2)  # SFT has no rejected response of its own
            self.pair_weights = weigh_pairs(method, references, self.tokens, pairs)
        if method.standardised:
            obstacles = [self.tokens.masked_records, *self.lacking.values()]
            usable = ~np.logical_or.reduce([*obstacles, references.initial.store.masked_records])
            standardise(method, references, self.columns, usable)

    @property
    def initial(self) -> LogprobStore | None:
        """The initial pivot's log-probs, or None without sources."""
        return None if self.references is None else self.references.initial.store

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the M sources."""
        return () if self.references is None else self.references.names

    def pair_lengths(self, layout: RowLayout = PLAIN) -> np.ndarray:
        """Return int64 `[N]`, tokens of each pair in a row of this layout."""
        prompts = self.tokens.prompt_lengths.astype(np.int64)
        return layout.pair_tokens(prompts, self._response_tokens, self._response_counts)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> PreferencePair:
        """Return one pair; its arrays are its own and writable."""
        tokens, columns = self.tokens.record(index), self.columns[index]
        ids, marks = tokens.response_ids, tokens.scored
        targets, first = self.targets if self.hands_out_targets else None, int(columns[0])
        length = int(self.tokens.scored_lengths[index, first])
        return PreferencePair(
            int(index),
            tokens.prompt_ids,
            tuple(_NONE if c < 0 else ids[c] for c in columns),
            int(self.domain_codes[index]),
            None if self.references is None else self.references.take(index, columns),
            marks and tuple(_NO_MARK if c < 0 else marks[c] for c in columns),
            None if self.rewards is None else self.rewards[index].copy(),
            None if targets is None else targets.take(index, first, length),
            None if targets is None else targets.groups,
            None if self.pair_weights is None else float(self.pair_weights[index]),
        )

    def names(self, index: int) -> tuple[str, ...]:
        """Return the names of a record's responses that are used."""
        return tuple(self.tokens.responses[c] for c in self.columns[index] if c >= 0)

    def _used_rewards(self) -> np.ndarray | None:
        """Return float64 `[N, R]`, the scores of the used responses; 0 where there is none."""
        if self.tokens.scores is None:
            return None
        scores = np.take_along_axis(self.tokens.scores, self.columns, axis=1)
        return np.where((self.columns < 0) | np.isnan(scores), 0.0, scores)

    def align_domains(self, names: tuple[str, ...]) -> None:
        """Number the domains as another dataset does: first its names, then our own others."""
        both = (*names, *(name for name in self.domains if name not in names))
        code = np.array([both.index(name) for name in self.domains])
        self.domain_codes, self.domains = code[self.domain_codes], both

    def eligible(self, max_tokens: int) -> np.ndarray:
        """Return the records that can be trained on.

        Args:
            max_tokens: longest response with its prompt.

        Returns:
            int64 indices, ascending, of the records that have tokens, whose segments all fit, and
            that the initial pivot has log-probs for (without it there is nothing to clip against).
        """
        return np.flatnonzero(~np.logical_or.reduce([*self._obstacles(max_tokens).values()]))

    def left_out(self, max_tokens: int) -> dict[str, int]:
        """Return how many records `eligible` leaves out, by the first reason that holds."""
        counts, before = {}, np.zeros(len(self), dtype=bool)
        for reason, holds in self._obstacles(max_tokens).items():
            counts[reason] = int((holds & ~before).sum())
            before |= holds
        return {reason: count for reason, count in counts.items() if count}

    def too_long(self, max_tokens: int) -> str | None:
        """Say how many records of each domain are longer, and its longest; None if none is."""
        long = self.segment_lengths > max_tokens
        if not long.any():
            return None
        found = by_domain(self.domains, self.domain_codes, long, self.segment_lengths)
        return f"{_long(max_tokens)}: {found}"

    def _obstacles(self, max_tokens: int) -> dict[str, np.ndarray]:
        """Return bool `[N]` by reason: the records that it keeps from being trained on."""
        found = {
            "the chat template refuses them": self.tokens.masked_records,
            _long(max_tokens): self.segment_lengths > max_tokens,
        }
        found |= self.lacking
        if self.initial is not None:
            found["without log-probs of the initial pivot"] = self.initial.masked_records
        return found

    def require_eligible(self, max_tokens: int) -> np.ndarray:
        """Return `eligible(max_tokens)`.

        Raises:
            UserError: no record is eligible.
        """
        indices = self.eligible(max_tokens)
        if not len(indices):
            others = self._obstacles(max_tokens)
            del others[_long(max_tokens)]
            usable = self.segment_lengths[~np.logical_or.reduce([*others.values()])]
            advice = ""
            if len(usable):
                advice = (
                    f": the shortest needs {usable.min()} tokens and --seq-length is {max_tokens}; "
                    "raise it"
                )
            elif self.initial is not None and self.initial.masked_records.any():
                advice = "; score the initial pivot with a longer --context-length"
            raise UserError(
                f"none of the {len(self)} records of {self.tokens.prefix} is left "
                f"({counted(self.left_out(max_tokens))}){advice}"
            )
        return indices


def _long(max_tokens: int) -> str:
    return f"longer than --seq-length {max_tokens}"
