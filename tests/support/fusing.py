"""Toy vocabularies, and log-prob data sets with made-up distributions over tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_infifpo.fusing.vocabulary import Vocabulary
from megatron_infifpo.records.records import PreferenceRecord, records_fingerprint, response_names
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.top_k import Packed, pack_logps, text_identity
from megatron_infifpo.tokens.tokenization import ChatTokenizer

# Of a response: the record's number, which response, its scored ids -> log-probs `[L, V]`.
Teacher = Callable[[int, int, np.ndarray], np.ndarray]


def toy(pieces: Sequence[str | bytes], *, end_of_turn: Sequence[int] = ()) -> Vocabulary:
    """A vocabulary that takes the longest piece each time; a piece "" is a special token."""
    found = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    longest = sorted((p for p in range(len(found)) if found[p]), key=lambda p: -len(found[p]))

    def encode(texts: list[str]) -> list[list[int]]:
        return [_cut(text.encode(), found, longest) for text in texts]

    return Vocabulary(found, end_of_turn, encode)


def _cut(text: bytes, pieces: Sequence[bytes], longest: Sequence[int]) -> list[int]:
    ids = []
    while text:
        best = next((p for p in longest if text.startswith(pieces[p])), None)
        if best is None:
            return []
        ids.append(best)
        text = text[len(pieces[best]) :]
    return ids


def random_teacher(vocab_size: int, seed: int) -> Teacher:
    """Distributions that depend on the seed, the record and the response alone."""

    def teacher(index: int, response: int, ids: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng([seed, index, response])
        logits = 3 * rng.normal(size=(len(ids), vocab_size))
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    return teacher


def top_of(dense: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k highest of log-probs `[L, V]`: ids int32 and float32 log-probs, `[L, k]`."""
    ids = np.argsort(-dense, axis=1, kind="stable")[:, :k]
    return ids.astype(np.int32), np.take_along_axis(dense, ids, axis=1).astype(np.float32)


def write_top_k(
    prefix: Path,
    records: Sequence[PreferenceRecord],
    chat: ChatTokenizer,
    teacher: Teacher,
    *,
    k: int = 4,
    vocab_size: int,
    masked: dict[int, str] | None = None,
    responses: str = "all",
    **fields: Any,
) -> None:
    """Write the log-probs of a model that speaks with a tokenizer, and its top k."""
    manifest = {
        "model": prefix.name, "weights_sha256": "w" * 64, "tokenizer": chat.describe(),
        "records_sha256": records_fingerprint(records), "backend": "test", "dtype": "float32",
        "versions": {},
    } | fields  # fmt: skip
    top_k = {
        "k": k, "responses": responses, "temperature": 1.0, "vocab_size": vocab_size,
        "end_of_turn_ids": chat.end_of_turn_ids,
    }  # fmt: skip
    listed = records[0].listed
    names = response_names(max(len(r.responses) for r in records), listed=listed)
    with LogprobWriter(prefix, responses=names, manifest=manifest, top_k=top_k) as writer:
        for index, record in enumerate(records):
            if reason := (masked or {}).get(index):
                writer.mask(record.id, reason)
                continue
            tokens, values, top = chat.encode(record), [], []
            for response, ids in enumerate(tokens.response_ids):
                scored = ids if tokens.scored is None else ids[tokens.scored[response]]
                dense = teacher(index, response, scored)
                values.append(dense[np.arange(len(scored)), scored].astype(np.float32))
                kept = dense if responses == "all" or response == 0 else dense[:0]
                found, logps = top_of(kept, k)
                lengths = chat.token_bytes.lengths[scored]
                text = text_identity(chat.token_bytes.join(scored.tolist()))
                top.append(Packed(found, pack_logps(logps), lengths, text))
            writer.add(record.id, values, top=top)
