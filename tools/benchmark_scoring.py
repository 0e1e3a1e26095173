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
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from megatron_infifpo import cpu
from megatron_infifpo.cli import UserError, positive, run
from megatron_infifpo.data.records import read_records
from megatron_infifpo.data.tokenization import ChatTokenizer, TokenizedRecord
from megatron_infifpo.scoring.rows import Limits, ShardRows, prepare_shard
from megatron_infifpo.scoring.score import BACKENDS

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
    found: dict[str, list[dict]] = {name: [] for name in (PEER, *BACKENDS)}
    for _ in range(args.rounds):
        for name in found:
            found[name].append(in_a_process(name))
            print(f"{name:<14}{found[name][-1]['rate']:>9.1f} tokens/s", file=sys.stderr)
    report(found, args)


def in_a_process(name: str) -> dict:
    """Run this program again for one method."""
    command = [sys.executable, *sys.argv, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(found: dict[str, list[dict]], args: argparse.Namespace) -> None:
    """Print medians, ratios to the peer, and the largest difference of a response's sum."""
    rate = {name: statistics.median(r["rate"] for r in runs) for name, runs in found.items()}
    memory = {name: statistics.median(r["mib"] for r in runs) for name, runs in found.items()}
    expected = np.array(found[PEER][0]["sums"])
    print(
        f"{args.pairs} pairs, {found[PEER][0]['tokens']} tokens, "
        f"{'bfloat16' if args.bf16 else 'float32'}, {args.threads} threads, "
        f"medians of {args.rounds}"
    )
    print(f"{'':<14}{'tokens/s':>10}{'ratio':>8}{'MiB':>8}{'ratio':>8}{'worst sum':>11}")
    for name, runs in found.items():
        difference = np.abs(np.array(runs[0]["sums"]) - expected).max()
        print(
            f"{name:<14}{rate[name]:>10.1f}{rate[name] / rate[PEER]:>8.2f}"
            f"{memory[name]:>8.0f}{memory[name] / memory[PEER]:>8.2f}{difference:>11.1e}"
        )


def measure(args: argparse.Namespace) -> dict:
    """Load a model, warm up, score; rate, peak memory and sums by response."""
    torch.set_num_threads(args.threads)
    records = read_records(args.input)[: args.pairs]
    tokenizer = ChatTokenizer.from_pretrained(args.model)
    encoded = tokenizer.encode_batch(records)
    if args.only == PEER:
        score = padded(args, encoded)
    else:
        options = {"trust_remote_code": False} | dict.fromkeys(
            ("tensor_parallel", "pipeline_parallel"), 1
        )
        backend = BACKENDS[args.only](args.model, bf16=args.bf16, **options)
        shard = prepare_shard(
            0, records, tokenizer, Limits(1 << 30), vocab_size=backend.vocab_size,
            row_tokens=args.row_tokens, pad_multiple=1,
        )  # fmt: skip
        score = packed(backend, shard)
    score(2)
    start = time.perf_counter()
    sums = score(None)
    seconds = time.perf_counter() - start
    tokens = sum(len(t.prompt_ids) + len(ids) for t in encoded for ids in t.response_ids)
    mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if torch.cuda.is_available() and not cpu.is_enabled():
        mib = torch.cuda.max_memory_allocated() / 2**20
    return {"rate": tokens / seconds, "mib": mib, "tokens": tokens, "sums": sums}


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

    device = "cuda" if torch.cuda.is_available() else "cpu"
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
