"""Check soft targets, value by value: what they are of, and whether they can be."""

import hashlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from megatron_infifpo.checks.faults import MASS, Rule, check_rules, twice
from megatron_infifpo.errors import UserError
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.reference import logprobs_identity
from megatron_infifpo.references.soft_targets import (
    FILES,
    GROUPS_FILE,
    MADE_BY,
    SEVERAL,
    VALUES,
    VALUES_FILE,
    SoftTargets,
    SoftTargetStore,
    add_values,
)
from megatron_infifpo.references.sources import INITIAL, SourcesConfig
from megatron_infifpo.storage.documents import Documents
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer

_AGAIN = f"fuse them again with {MADE_BY}"
_ROUNDING = 1e-5  # of sums of float32 log-probs and shares


class CheckedTargets:
    """Reads soft targets, and refuses values that cannot be.

    Ids are the pivot's, each once a token; log weights are at most 0, and with the tail's their
    probabilities sum to 1; sources are known; chunks lie within the response, and those of one
    source do not overlap. A response has targets of all of its scored tokens, or none.

    Attributes:
        store: the soft targets.
        files: all of it but groups, by their names.
    """

    def __init__(self, store: SoftTargetStore, tokens: TokenDataset, vocabulary: int) -> None:
        """Take soft targets of these tokens, of a pivot with so many ids.

        Raises:
            UserError: they are of other tokens, or name groups of other ids.
        """
        store.check_against(tokens)
        self.store, self._tokens, self._vocabulary = store, tokens, vocabulary
        kinds = {VALUES_FILE: np.uint16} if store.fusion == VALUES else FILES
        self.files = {
            name: Documents(store.prefix + name, kind, len(tokens.responses))
            for name, kind in kinds.items()
        }
        _check_groups(store, vocabulary)

    def take(self, index: int, response: int) -> SoftTargets:
        """Return the soft targets of one response.

        Raises:
            UserError: a value cannot be; names the response, the token and the file.
        """
        length = int(self._tokens.scored_lengths[index, response])
        found, store = self.store.take(index, response, length, check=False), self.store
        name = f"record {self._tokens.ids(index)!r}, {self._tokens.responses[response]!r}"
        if found.values is not None:
            rules = _rules_of_values(found.values)
        elif len(packed := self.files["_logps"].sequences(index)[response]):
            rules = _rules(store, found, _floats(packed, length), self._vocabulary)
        else:
            return found
        check_rules(rules, name, store.prefix, _AGAIN)
        return found


def check_soft_targets(store: SoftTargetStore, tokens: TokenDataset) -> str:
    """Read every value, and compare all of them with the manifest's fingerprint.

    Returns:
        How many responses and tokens have targets.

    Raises:
        UserError: a value cannot be, or is another one than was written.
    """
    chat, digest = ChatTokenizer.reopen(tokens.manifest["tokenizer"]), hashlib.sha256()
    checked = CheckedTargets(store, tokens, len(chat.token_bytes.pieces))
    for group in store.groups or ():
        add_values(digest, [group])
    responses = rows = taught = 0
    for index in tqdm(range(len(store)), desc=f"values of {store.prefix}", leave=False):
        parts = [file.sequences(index) for file in checked.files.values()]
        for each in parts:
            add_values(digest, each)
        for response in range(len(tokens.responses)):
            there = has_target(checked.take(index, response))
            if any(len(each[response]) for each in parts):
                responses, rows, taught = responses + 1, rows + len(there), taught + there.sum()
    if digest.hexdigest() != store.fingerprint:
        raise UserError(
            f"{store.prefix} has values of fingerprint {digest.hexdigest()[:12]}, expected "
            f"{store.fingerprint[:12]} by {store.prefix}.json: the files were changed or damaged; "
            f"{_AGAIN}"
        )
    share = f"{taught / rows:.1%} of their {rows} tokens" if rows else "no token"
    return f"{store.fusion}: {responses} responses, {share} from {', '.join(store.sources)}"


def has_target(targets: SoftTargets) -> np.ndarray:
    """Whether a token is taught by a source, bool `[K]`."""
    if targets.values is None:
        return targets.sources > 0
    return ~np.isnan(targets.values).all(axis=(1, 2))


def _floats(packed: np.ndarray, length: int) -> np.ndarray:
    """Return float16 numbers, float64 `[length, ...]`, from their bits."""
    return packed.view(np.float16).astype(np.float64).reshape(length, -1)


def _check_groups(store: SoftTargetStore, vocabulary: int) -> None:
    for number, group in enumerate(store.groups or ()):
        inside = len(group) and (group >= 0).all() and (group < vocabulary).all()
        if not inside or len(np.unique(group)) < len(group):
            raise UserError(
                f"{store.prefix}{GROUPS_FILE}.bin has the group {number} of ids {group.tolist()}, "
                f"expected different ids below {vocabulary}: the files were changed or damaged; "
                f"{_AGAIN}"
            )


def _rules(
    store: SoftTargetStore, targets: SoftTargets, logps: np.ndarray, vocabulary: int
) -> Iterator[Rule]:
    """What holds of a response's targets; logps float64 `[K, k + 1]`, as they are stored."""
    ids, sources, groups = targets.ids, targets.sources, len(store.groups or ())
    yield Rule(
        (ids >= vocabulary) | (-(ids + 2) >= groups),
        "_ids.bin",
        lambda t: (
            f"the ids {ids[t].tolist()}, expected ids below {vocabulary}, -1 for none, and "
            f"{groups} groups from -2 down"
        ),
    )
    yield Rule(
        twice(ids, among=ids != -1),
        "_ids.bin",
        lambda t: f"the ids {ids[t].tolist()}, expected each of them once",
    )
    yield Rule(
        ~(logps <= 0) | np.pad((ids == -1) & np.isfinite(logps[:, :-1]), ((0, 0), (0, 1))),
        "_logps.bin",
        lambda t: (
            f"the log weights {logps[t].tolist()}, expected numbers of at most 0, -inf where "
            "there is no id, and that of all other ids"
        ),
    )
    mass = np.exp(logps).sum(axis=1)
    yield Rule(
        abs(mass - 1) > MASS,
        "_logps.bin",
        lambda t: f"log weights whose probabilities sum to {mass[t]:.4f}, expected 1",
    )
    yield Rule(
        (sources > len(store.sources)) & (sources != SEVERAL),
        "_sources.bin",
        lambda t: (
            f"the source {sources[t]}, expected 0 (none), 1 to {len(store.sources)}, or "
            f"{SEVERAL} (several)"
        ),
    )
    yield Rule(
        (sources == 0) & (ids != -1).any(axis=1),
        "_sources.bin",
        lambda t: f"no source, but {store.prefix}_ids.bin has the ids {ids[t].tolist()}",
    )
    yield from _rules_of_chunks(targets, len(store.sources))


def _rules_of_chunks(targets: SoftTargets, most: int) -> Iterator[Rule]:
    """What holds of a response's chunks, of at most so many sources one after the other."""
    chunks, logps, weights = targets.chunks, targets.chunk_logps, targets.chunk_weights
    first, end = chunks.T
    length = len(targets.sources)
    yield Rule(
        (first < 0) | (end <= first) | (end > length),
        "_chunks.bin",
        lambda c: f"as a chunk the tokens {first[c]} to {end[c]}, expected some of {length}",
        "chunk",
    )
    yield Rule(
        np.array([len(logps) != len(chunks)]),
        "_chunk_logps.bin",
        lambda c: f"{len(logps)} log-probs of chunks, expected {len(chunks)}",
        "chunk",
    )
    # Each source's chunks ascend: where they do not, the next source's begin.
    falls = np.diff(first, prepend=-1) <= 0
    yield Rule(
        falls & (np.cumsum(falls) >= most),
        "_chunks.bin",
        lambda c: (
            f"as a chunk the tokens {first[c]} to {end[c]} behind those from {first[c - 1]} "
            f"on, expected ascending chunks of each of {most} sources"
        ),
        "chunk",
    )
    yield Rule(
        ~(np.isfinite(logps) & (logps <= _ROUNDING)),
        "_chunk_logps.bin",
        lambda c: f"{logps[c]} as log-prob of a chunk, expected a number of at most 0",
        "chunk",
    )
    yield Rule(
        ~((weights > 0) & (weights <= 1 + _ROUNDING)),
        "_chunk_logps.bin",
        lambda c: f"{weights[c]} as weight of a chunk, expected one above 0, at most 1",
        "chunk",
    )
    change = np.bincount(first, weights, length + 1) - np.bincount(end, weights, length + 1)
    covered = np.cumsum(change)[:-1]
    yield Rule(
        covered > 1 + 1e-3,
        "_chunks.bin",
        lambda t: (
            f"chunks of a weight of {covered[t]:.4f} together, expected at most 1: those of "
            "one source do not overlap"
        ),
    )


def _rules_of_values(values: np.ndarray) -> Iterator[Rule]:
    """What holds of the sources' own highest log-probs, `[K, M, k]`."""
    missing = np.isnan(values)
    some = missing.any(axis=2) & ~missing.all(axis=2)
    rising = np.zeros_like(missing)
    rising[..., 1:] = values[..., 1:] > values[..., :-1]
    yield Rule(
        some[..., None] | (values > 0) | rising,
        f"{VALUES_FILE}.bin",
        lambda t: (
            f"the values {values[t].tolist()}, expected of each source falling numbers of at "
            "most 0, or none"
        ),
    )
    mass = np.where(missing, 0.0, np.exp(values)).sum(axis=2)
    yield Rule(
        mass > 1 + MASS,
        f"{VALUES_FILE}.bin",
        lambda t: f"values whose probabilities sum to {mass[t].max():.4f}, expected at most 1",
    )


def check_fused_from(store: SoftTargetStore, config: SourcesConfig) -> str:
    """Compare the log-probs that targets were fused from with those of a sources.yaml.

    Raises:
        UserError: they are others; says which.
    """
    prefixes = {source.name: source.logprobs for source in config.sources}
    prefixes[INITIAL] = config.initial
    for name in store.sources:
        if name not in prefixes:
            raise UserError(
                f"{store.prefix} was fused from {name}, expected one of {config.path}: "
                f"{', '.join(prefixes)}"
            )
        used = store.manifest["models"].get(name, {})
        for what, value in logprobs_identity(LogprobStore(prefixes[name])).items():
            if used.get(what) != value:
                raise UserError(
                    f"{store.prefix} was fused from other log-probs of {name} than "
                    f"{prefixes[name]}: their {what} was {str(used.get(what))[:12]}, and is now "
                    f"{str(value)[:12]}; {_AGAIN}"
                )
    return f"the log-probs of {', '.join(store.sources)}"
