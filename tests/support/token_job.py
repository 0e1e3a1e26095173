"""Token-level fusion without any model: two vocabularies, made-up distributions, soft targets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_infifpo.fusing.job import FusingJob, fuse_targets
from megatron_infifpo.records.records import read_records
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.prepare import PreparationJob, prepare
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from support.datasets import CHATML, SPECIALS, write_jsonl
from support.fusing import Said, Teacher, write_top_k

PIVOT = (" so", " be", " it", "20", "201", " the")
SOURCES = {"a": (" so", " be", " it", " the"), "b": (" so", " be", "so", " t")}
MASKED = 3  # the record that source b has no log-probs of
K = 4


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a byte, and words, each merged from its beginning."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {c: i for i, c in enumerate(alphabet)}, []
    for word in words:
        text = word.replace(" ", "\u0120")
        for end in range(1, len(text)):
            left, right = text[:end], text[end]
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.setdefault(left + right, len(vocabulary))
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **specials)


def knowing(vocab_size: int, seed: int) -> Teacher:
    """Distributions in which the token itself is probable, but at every third one."""

    def teacher(index: int, response: int, ids: np.ndarray) -> Said:
        rng, rows = np.random.default_rng([seed, index, response]), np.arange(len(ids))
        logits = 2 * rng.normal(size=(len(ids), vocab_size))
        logits[rows, ids] += np.where(rows % 3, 8, -4)
        logps = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        highest = np.argsort(-logps, axis=1)[:, :K]
        found = np.take_along_axis(logps, highest, axis=1)
        return Said(logps[rows, ids], highest, found)

    return teacher


class TokenJob:
    """Files of a job of token-level fusion on pairs.

    Attributes:
        folder: of all files.
        data: prefix of the token data set.
        sources: sources.yaml, of the sources a and b; b knows the domain math alone.
        chats: tokenizers by name, "pivot" among them.
    """

    def __init__(self, folder: Path, count: int = 6) -> None:
        """Write records, tokens and log-probs."""
        self.folder, self.data, self.sources = folder, folder / "data", folder / "sources.yaml"
        path = write_jsonl(
            folder / "sft.jsonl",
            *(
                {
                    "id": f"q{i}", "domain": "math" if i % 2 else "text", "prompt": "how many?",
                    "chosen": f"so be it 201{' the' * i} so", "rejected": f"no {i}",
                }
                for i in range(count)
            ),
        )  # fmt: skip
        self.chats = {}
        for name, words in {"pivot": PIVOT, **SOURCES}.items():
            tokenizer = folder / f"tokenizer-{name}"
            word_tokenizer(words).save_pretrained(tokenizer)
            self.chats[name] = ChatTokenizer.from_pretrained(tokenizer)
        prepare(PreparationJob([str(path)], str(folder / "tokenizer-pivot"), str(self.data)))
        for seed, (name, chat) in enumerate(self.chats.items()):
            write_top_k(
                folder / name, read_records(path), chat,
                knowing(len(chat.tokenizer), seed), k=K, vocab_size=len(chat.tokenizer),
                masked={MASKED: "too long"} if name == "b" else None, responses="chosen",
                weights_sha256=f"{seed}" * 64,
            )  # fmt: skip
        self.sources.write_text(
            "initial: pivot\nsources:\n  - {name: a, logprobs: a}\n"
            "  - {name: b, logprobs: b, domains: [math]}\n"
        )

    @property
    def tokens(self) -> TokenDataset:
        """The pivot's tokens."""
        return TokenDataset(self.data)

    def fuse(self, name: str, **options) -> str:
        """Write soft targets; returns their prefix."""
        prefix = str(self.folder / name)
        fuse_targets(FusingJob(str(self.data), str(self.sources), prefix, **options))
        return prefix
