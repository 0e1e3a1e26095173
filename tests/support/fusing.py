"""Toy vocabularies, and log-prob data sets with made-up distributions over tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_infifpo.fusing.job import FusingJob, fuse_targets
from megatron_infifpo.fusing.vocabulary import Vocabulary
from megatron_infifpo.gpu_check.tiny import WORDS, save_tokenizer
from megatron_infifpo.records.records import (
    PreferenceRecord,
    records_fingerprint,
    reply,
    response_names,
)
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.references.soft_targets import SoftTargets, SoftTargetStore
from megatron_infifpo.references.top_k import Packed, pack_logps
from megatron_infifpo.scoring.top_k import TopKeeper
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset
from support.datasets import byte_tokenizer


class Said(NamedTuple):
    """What a model says of L scored tokens: their log-probs `[L]`, and its top k `[L, k]`."""

    values: np.ndarray
    ids: np.ndarray
    logps: np.ndarray


K = 4
RECORDS = [
    PreferenceRecord(
        id=f"r-{i}",
        domain=("math", "code")[i % 2],
        prompt=({"role": "user", "content": "why?"},),
        responses=(reply(f"{' '.join(WORDS[i : i + 2 + i % 4])} is {17 * i} ça"), reply(f"no {i}")),
    )
    for i in range(8)
]


# Of a response: the record's number, which response, its scored ids.
Teacher = Callable[[int, int, np.ndarray], Said]


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


def dense(vocab_size: int, seed: int, *, k: int = K, order: np.ndarray | None = None) -> Teacher:
    """Distributions that depend on the seed, the record, the response and their ids alone.

    Args:
        vocab_size: V.
        seed: of what is said.
        k: of the top k.
        order: `[V]`, another number for every id, by which the model calls it.
    """
    names = np.arange(vocab_size) if order is None else order

    def teacher(index: int, response: int, ids: np.ndarray) -> Said:
        rng = np.random.default_rng([seed, index, response])
        logits = 3 * rng.normal(size=(len(ids), vocab_size))
        logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        highest = np.argsort(-logps, axis=1)[:, :k]
        observed = np.argsort(names)[ids]
        return Said(
            logps[np.arange(len(ids)), observed],
            names[highest],
            np.take_along_axis(logps, highest, axis=1),
        )

    return teacher


def sparse(vocab_size: int, seed: int, *, k: int = 4) -> Teacher:
    """A large model: the token of the text, and others at random."""

    def teacher(index: int, response: int, ids: np.ndarray) -> Said:
        rng = np.random.default_rng([seed, index, response])
        others = rng.integers(0, vocab_size, (len(ids), k))
        others[:, 0] = ids
        logps = np.log(-np.sort(-rng.dirichlet(np.ones(k + 1), len(ids)), axis=1))[:, :k]
        return Said(logps[:, 0], others, logps)

    return teacher


def write_top_k(
    prefix: Path,
    records: Sequence[PreferenceRecord],
    chat: ChatTokenizer,
    teacher: Teacher,
    *,
    vocab_size: int,
    k: int = K,
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
            texts = TopKeeper(k, responses, chat).texts(record, tokens)
            for response, ids in enumerate(tokens.response_ids):
                scored = ids if tokens.scored is None else ids[tokens.scored[response]]
                said = teacher(index, response, scored)
                values.append(said.values.astype(np.float32))
                rows = slice(None if responses == "all" or response == 0 else 0)
                logps = pack_logps(said.logps[rows].astype(np.float32))
                top.append(Packed(said.ids[rows].astype(np.int32), logps, *texts[response]))
            writer.add(record.id, values, top=top)


class Models:
    """A pivot, sources with other tokenizers, and what all of them say of the records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tokenizer(folder / "pivot", 330)
        save_tokenizer(folder / "other", 290)
        byte_tokenizer().save_pretrained(folder / "bytes")
        self.chat = {
            name: ChatTokenizer.from_pretrained(folder / name)
            for name in ("pivot", "other", "bytes")
        }
        self.data = folder / "train"
        write_token_dataset(RECORDS, self.chat["pivot"], self.data)
        self.tokens = TokenDataset(self.data)
        for seed, (name, chat) in enumerate(self.chat.items()):
            size = len(chat.token_bytes.pieces) + 8  # of the model: padded
            masked = {3: "too long"} if name == "other" else None
            said = dense(size, seed, k=K)
            prefix = folder / f"{name}-logps"
            write_top_k(prefix, RECORDS, chat, said, k=K, vocab_size=size, masked=masked)

    def sources(self, *names: str, **more: str) -> Path:
        """A sources.yaml of these sources."""
        lines = [f"initial: {more.pop('initial', 'pivot-logps')}", "sources:"]
        lines += [
            f"  - {{name: {name}, logprobs: {name}-logps{more.get(name, '')}}}" for name in names
        ]
        path = self.folder / f"{abs(hash((names, *more.items())))}.yaml"
        path.write_text("\n".join(lines if names else lines[:1]) + "\n", encoding="utf-8")
        return path

    def fuse(
        self, output: str, *names: str, yaml: Path | None = None, **options
    ) -> SoftTargetStore:
        """Run the job."""
        sources = yaml or self.sources(*names)
        job = FusingJob(str(self.data), str(sources), str(self.folder / output), **options)
        fuse_targets(job)
        return SoftTargetStore(job.output)

    def take(self, store: SoftTargetStore, index: int, response: int = 0) -> SoftTargets:
        """The targets of a response."""
        length = int(self.tokens.scored_lengths[index, response])
        return store.take(index, response, length)
