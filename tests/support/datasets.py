"""Small tokenizers, records and datasets for the data tests."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_infifpo.records.records import (
    PreferenceRecord,
    records_fingerprint,
    reply,
    response_names,
)
from megatron_infifpo.references.logprob_writer import LogprobWriter
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.tokenization import ChatTokenizer
from megatron_infifpo.tokens.writer import write_token_dataset

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(template: str | None = CHATML, **options: Any) -> PreTrainedTokenizerFast:
    """One token a byte, plus the special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **options)


def record(number: int, *, domain: str = "general", pivot: bool = False) -> PreferenceRecord:
    """A record whose texts have lengths of their own."""
    return PreferenceRecord(
        id=f"r-{number}",
        domain=domain,
        prompt=({"role": "user", "content": "why? " * (1 + number % 3)},),
        responses=(
            reply("yes " * (1 + number % 5) + str(number)),
            reply("no " * (1 + number % 4) + str(number)),
            *((reply(f"maybe {number}"),) if pivot else ()),
        ),
    )


def list_record(
    number: int, *, domain: str = "general", scores: bool = True, most: int = 5
) -> PreferenceRecord:
    """A record of 2 to `most` responses; of every third one a response has no score."""
    count = 2 + number % (most - 1)
    texts = [f"{'so ' * (1 + (number + 3 * i) % 5)}{number} {i}" for i in range(count)]
    judged = [float((7 * number + 5 * i) % 4) for i in range(count)]
    if number % 3 == 0:
        judged[number % count] = math.nan
    return PreferenceRecord(
        id=f"r-{number}",
        domain=domain,
        prompt=({"role": "user", "content": "why? " * (1 + number % 3)},),
        responses=tuple(map(reply, texts)),
        scores=tuple(judged) if scores else None,
        listed=True,
    )


def write_tokens(
    folder: Path, records: Sequence[PreferenceRecord], name: str = "tokens"
) -> TokenDataset:
    prefix = folder / name
    write_token_dataset(records, ChatTokenizer(byte_tokenizer()), prefix, source_files=["a.jsonl"])
    return TokenDataset(prefix)


def manifest_fields(records: Sequence[PreferenceRecord], model: str = "m") -> dict[str, Any]:
    return {
        "model": model,
        "weights_sha256": "w" * 64,
        "tokenizer": ChatTokenizer(byte_tokenizer()).describe(),
        "records_sha256": records_fingerprint(records),
        "backend": "test",
        "dtype": "float32",
        "versions": {},
    }


def write_scores(
    prefix: Path,
    records: Sequence[PreferenceRecord],
    lengths: np.ndarray,
    *,
    masked: Sequence[int] = (),
    seed: int = 0,
    **fields: Any,
) -> None:
    """Random log-probs of `lengths` `[N, R]` tokens, 0 where a list has no such response."""
    rng = np.random.default_rng(seed)
    manifest = manifest_fields(records) | fields
    names = response_names(lengths.shape[1], listed=records[0].listed)
    with LogprobWriter(prefix, responses=names, manifest=manifest) as writer:
        for i, record in enumerate(records):
            if i in masked:
                writer.mask(record.id, "too long")
            else:
                values = [-rng.random(n, dtype=np.float32) for n in lengths[i] if n]
                writer.add(record.id, values)


def write_jsonl(path: Path, *values: Any) -> Path:
    lines = [v if isinstance(v, str) else json.dumps(v) for v in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
