"""Soft targets of one record, token by token: what each of the pivot's is taught, and by whom."""

from collections.abc import Iterator, Mapping

import numpy as np

from megatron_infifpo.checks.soft_targets import CheckedTargets, has_target
from megatron_infifpo.fusing.align import Response, align_response, same_tokenizer
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.soft_targets import GROUPED, SEVERAL, SoftTargets, SoftTargetStore
from megatron_infifpo.references.sources import INITIAL
from megatron_infifpo.references.top_k import text_identity
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer

SHOWN = 4
"""Most probable ids of a token."""
_ALONE = "cross-entropy alone"
_SAME = '"'  # a token of a text that began above
_SPECIAL = "(special)"
_Row = tuple[str, str, str, str]
"""A token, its source, that one's tokens, and what they say."""


class _Text:
    """A response, in the pivot's scored tokens."""

    def __init__(self, ids: np.ndarray, chat: ChatTokenizer) -> None:
        """Take the `[K]` ids, and the pivot's tokenizer."""
        self.ids, self._chat, known = ids, chat, chat.token_bytes
        self._joined = known.join(ids.tolist())
        lengths = known.lengths[ids].astype(np.int64)
        self._response = Response(lengths, *text_identity(self._joined))

    def show(self, token: int) -> str:
        """Show a token of the pivot."""
        piece = self._chat.token_bytes.pieces[token]
        return _shown(piece) if piece else repr(self._chat.tokenizer.decode([token]))

    def tokens_of(
        self,
        store: LogprobStore,
        index: int,
        response: int,
        **how: bool,
    ) -> dict[int, str]:
        """Return a source's tokens by the pivot's that they are, or by the first one of a text.

        The other ones of such a text have a mark; what is not comparable is not there. They are
        aligned as `fuse-targets` does it: see `align_response` for how.
        """
        lengths = store.byte_lengths(index, response).astype(np.int64)
        own = Response(lengths, *map(int, store.texts[index, response]))
        found = align_response(self._response, own, **how)
        if found is None or not len(lengths):
            return {}
        # Where white space at the ends differs, the texts are the same from there on.
        ends = np.cumsum(lengths) - own.lead + self._response.lead
        pieces = [
            _shown(self._joined[max(end - length, 0) : max(end, 0)]) if length else _SPECIAL
            for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
        ]
        shown = {t: pieces[u] for t, u in zip(found.rows, found.source_rows, strict=True)}
        for (first, end), (begin, until) in zip(found.chunks, found.source_chunks, strict=True):
            shown |= dict.fromkeys(range(first, end), _SAME)
            shown[int(first)] = " ".join(pieces[begin:until])
        return shown


def token_table(
    dataset: PreferenceDataset, index: int, chat: ChatTokenizer, prefix: str
) -> Iterator[str]:
    """Show what soft targets say of a record's tokens.

    Args:
        dataset: the records; with sources their tokens are shown beside the pivot's.
        index: of the record.
        chat: the pivot's tokenizer.
        prefix: of the soft targets.

    Raises:
        UserError: they are of other tokens, or broken.
    """
    store, record = SoftTargetStore(prefix), dataset.tokens.record(index)
    checked = CheckedTargets(store, dataset.tokens, len(chat.token_bytes.pieces))
    marks = scored_marks(record.response_ids, record.scored)
    for r, mark in enumerate(marks[: None if dataset.tokens.listed else 1]):
        targets, text = checked.take(index, r), _Text(record.response_ids[r][mark], chat)
        taught = has_target(targets)
        name, whole = dataset.tokens.responses[r], len(targets.chunks)
        if not taught.any() and not whole:
            yield f"\n{name} has no soft targets: {_ALONE}"
            continue
        stores = _stores(dataset, index, store)
        sources = {
            source: text.tokens_of(
                each,
                index,
                r,
                is_pivot=source == INITIAL,
                same_ids=same_tokenizer(each.manifest, dataset.tokens.manifest),
                starts_suffice=store.manifest["ambiguous"] == GROUPED,
            )
            for source, each in stores.items()
        }
        what = store.fusion if targets.values is None else "values"
        yield f"\nsoft targets of {name}, {what} of {', '.join(store.sources)}, top {store.top_k}"
        rows = [("token", "source", "its tokens", "target")]
        if targets.values is None:
            rows += _fused_rows(store, targets, text, sources)
        else:
            rows += _value_rows(store, targets.values, text, sources)
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        for *cells, said in rows:
            padded = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
            yield f"{'  '.join(padded)}  {said}"
        yield f"{int(taught.sum())} of {len(taught)} tokens have a target; chunks beside: {whole}"


def _stores(
    dataset: PreferenceDataset, index: int, targets: SoftTargetStore
) -> dict[str, LogprobStore]:
    """The log-probs of the sources of soft targets that take part in a record."""
    if dataset.references is None:
        return {}
    known = {source.name: source for source in dataset.references.sources}
    known[INITIAL] = dataset.references.initial
    there = {n: known[n] for n in targets.sources if n in known and known[n].takes_part[index]}
    return {name: each.store for name, each in there.items() if each.store.top_k is not None}


def _fused_rows(
    store: SoftTargetStore,
    targets: SoftTargets,
    text: _Text,
    sources: Mapping[str, Mapping[int, str]],
) -> Iterator[_Row]:
    """A line a token: which source, its tokens there, the most probable ids, the tail."""
    codes = set(targets.sources.tolist()) - {0, SEVERAL}
    # Where all is of one source, texts that are not one to one are, too.
    one = [codes.pop() - 1] if len(codes) == 1 and SEVERAL not in targets.sources else []
    begins: dict[int, list[int]] = {}
    for chunk, (first, _) in enumerate(targets.chunks.tolist()):
        begins.setdefault(first, []).append(chunk)
    for t, code in enumerate(targets.sources.tolist()):
        named = [code - 1] if 0 < code < SEVERAL else one or range(len(store.sources))
        names = [store.sources[m] for m in named]
        source = {0: "-", SEVERAL: "several"}.get(code) or names[0]
        said = _ALONE
        if code:
            said = _probabilities(store, targets, t, text)
        for chunk in begins.get(t, ()):
            first, end = targets.chunks[chunk]
            weight = targets.chunk_weights[chunk]
            tokens = "1 token" if end - first == 1 else f"{end - first} tokens"
            said += f"; {tokens} as one chunk: log-prob {targets.chunk_logps[chunk]:.3f}"
            said += f", weight {weight:.3f}" if weight < 1 else ""
        yield text.show(int(text.ids[t])), source, _tokens_at(t, names, sources), said


def _value_rows(
    store: SoftTargetStore,
    values: np.ndarray,
    text: _Text,
    sources: Mapping[str, Mapping[int, str]],
) -> Iterator[_Row]:
    """A line a token and source: the source's highest log-probs `[K, M, k]`, falling."""
    for t, of_token in enumerate(values):
        shown = text.show(int(text.ids[t]))
        for name, found in zip(store.sources, of_token, strict=True):
            said = " ".join(f"{value:.3f}" for value in found)
            if np.isnan(found).any():
                said = _ALONE if np.isnan(of_token).all() else "not comparable"
            yield shown, name, _tokens_at(t, [name], sources), said
            shown = ""


def _tokens_at(t: int, names: list[str], sources: Mapping[str, Mapping[int, str]]) -> str:
    """What the sources have where the pivot has its token t."""
    found = {name: sources[name][t] for name in names if t in sources.get(name, {})}
    if len(names) == 1:
        return "".join(found.values())
    return ", ".join(f"{name} {shown}" for name, shown in found.items())


def _probabilities(store: SoftTargetStore, targets: SoftTargets, t: int, text: _Text) -> str:
    """The most probable ids of a token, and what is left."""
    there = np.flatnonzero(targets.ids[t] != -1)
    parts = []
    for place in there[:SHOWN]:
        number = int(targets.ids[t, place])
        shown = text.show(number) if number >= 0 else ""
        if number < 0:
            assert store.groups is not None
            group = store.groups[-(number + 2)].tolist()
            shown = f"{len(group)} ids such as {text.show(group[0])}"
        parts.append(f"{shown} {targets.probs[t, place]:.3f}")
    if (more := len(there) - SHOWN) > 0:
        parts.append(f"{more} more {targets.probs[t, there[SHOWN:]].sum():.3f}")
    return f"{', '.join(parts)}{', ' if parts else ''}tail {targets.tail[t]:.3f}"


def _shown(piece: bytes) -> str:
    """Show bytes, which may be part of a character."""
    return repr(piece.decode("utf-8", "backslashreplace")).replace(r"\\", "\\")
