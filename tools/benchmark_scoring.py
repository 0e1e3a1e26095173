#!/usr/bin/env python
"""Compare the scorer's two backends with transformers on padded batches: tokens/s and memory.

    python tools/benchmark_scoring.py --model smollm2 --input pairs.json

Every run is a process of its own that loads the model, scores some pairs to warm up, then the pairs
with the clock running. Runs alternate; medians count. Tokens are those of prompts and responses,
without padding.
"""

import argparse
import json
import os
import time
from collections.abc import Callable

import numpy as np
import torch

from megatron_infifpo.bench.jobs import alternate, on_gpu, peak_mib, table
from megatron_infifpo.commands.entry import run
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.records import read_records
from megatron_infifpo.scoring.job import BACKENDS
from megatron_infifpo.scoring.rows import Limits, ShardRows, prepare_shard
from megatron_infifpo.tokens.tokenization import ChatTokenizer, TokenizedRecord

PEER = "padded"


def main() -> None:
    """Run every method in turn and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--input", required=True, metavar="FILE", help="preference records")
    parser.add_argument("--pairs", type=positive, default=16, help="the first ones (default: 16)")
    parser.add_argument("--batch", type=positive, default=8, help="of the peer (default: 8)")
    parser.add_argument("--row-tokens", type=positive, default=8192, help="(default: 8192)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--bf16", action="store_true", help="(default: float32)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--only", choices=[PEER, *BACKENDS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args)))
        return
    found = alternate([PEER, *BACKENDS], args.rounds)
    expected = found[PEER][0]["sums"]
    for runs in found.values():
        for result in runs:
            result["worst"] = float(np.abs(np.subtract(result["sums"], expected)).max())
    print(
        f"{args.pairs} pairs, {found[PEER][0]['tokens']} tokens, "
        f"{'bfloat16' if args.bf16 else 'float32'}, medians of {args.rounds}"
    )
    table(found, PEER, {"tokens/s": "rate", "worst sum": "worst"})


def measure(args: argparse.Namespace) -> dict:
    """Load a model, warm up, score; rate, peak memory and sums by response."""
    torch.set_num_threads(args.threads)
    records = read_records(args.input)[: args.pairs]
    tokenizer = ChatTokenizer.from_pretrained(args.model)
    encoded = tokenizer.encode_batch(records)
    if args.only == PEER:
        score = padded(args, encoded)
    else:
        backend = BACKENDS[args.only].load(args.model, bf16=args.bf16)
        shard = prepare_shard(
            0, records, tokenizer, Limits(1 << 30), vocab_size=backend.vocab_size,
            row_tokens=args.row_tokens, layout=backend.layout,
        )  # fmt: skip
        score = packed(backend, shard)
    score(2)
    start = time.perf_counter()
    sums = score(None)
    seconds = time.perf_counter() - start
    tokens = sum(len(t.prompt_ids) + len(ids) for t in encoded for ids in t.response_ids)
    return {
        "seconds": seconds, "rate": tokens / seconds, "mib": peak_mib(), "tokens": tokens,
        "sums": sums,
    }  # fmt: skip


def packed(backend: object, shard: ShardRows) -> Callable[[int | None], list[float]]:
    """Score with a backend of ours."""

    def score(rows: int | None) -> list[float]:
        if rows is not None:  # warm-up on the shortest
            backend(shard.rows[-1:])  # type: ignore[operator]
            return []
        outputs = backend(shard.rows)  # type: ignore[operator]
        return [float(v.sum(dtype=np.float64)) for r in shard.unpack(outputs) for v in r]

    return score


def padded(
    args: argparse.Namespace, encoded: list[TokenizedRecord]
) -> Callable[[int | None], list[float]]:
    """Score as scripts around transformers do: batches in file order, padded, all logits."""
    from transformers import AutoModelForCausalLM

    device = "cuda" if on_gpu() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map={"": device})
    texts = [(t.prompt_ids, ids) for t in encoded for ids in t.response_ids]

    @torch.no_grad()
    def score(count: int | None) -> list[float]:
        sums = []
        for first in range(0, len(texts[:count]), args.batch):
            batch = texts[:count][first : first + args.batch]
            whole = [torch.from_numpy(np.concatenate(parts)).long() for parts in batch]
            ids = torch.nn.utils.rnn.pad_sequence(whole, batch_first=True).to(device)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(w) for w in whole], True)
            logits = model(ids, attention_mask=mask.to(device), use_cache=False).logits[:, :-1]
            logprobs = logits.float().log_softmax(-1)
            picked = logprobs.gather(2, ids[:, 1:, None]).squeeze(2)
            for row, (prompt, response) in zip(picked, batch, strict=True):
                start = len(prompt) - 1
                sums.append(row[start : start + len(response)].double().sum().item())
        return sums

    return score


if __name__ == "__main__":
    run(main)
