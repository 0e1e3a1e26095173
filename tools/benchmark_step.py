#!/usr/bin/env python
"""Compare a DPO step with TRL's and with Liger's fused loss: pairs/s, peak memory, matmul rate.

    python tools/benchmark_step.py --model smollm2 --input pairs.json --folder /tmp/benchmark

Same weights, same pairs, a reference that is computed beforehand, one optimizer step with AdamW a
batch, on one rank. TRL and Liger (where it is installed) run in transformers, in batches of
--peer-batch pairs; Liger without any reference, which it cannot take precomputed. The rate counts
what the model itself needs for its tokens (products with weights, causal attention, the head once),
and is given as a share of what large products reach just before and after each timed step.
"""

import argparse
import json
import os
from pathlib import Path

import torch

from megatron_infifpo.bench.jobs import alternate, table, write_pairs
from megatron_infifpo.bench.step import (
    LIGER,
    OURS,
    TRL,
    StepJob,
    installed,
    measure_step,
    model_operations,
)
from megatron_infifpo.commands.entry import run
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.records import read_records
from megatron_infifpo.tokens.tokenization import ChatTokenizer


def main() -> None:
    """Prepare data once, run every method in turn, print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a llama model")
    parser.add_argument("--input", required=True, metavar="FILE", help="preference records")
    parser.add_argument("--folder", required=True, type=Path, help="for what is prepared once")
    parser.add_argument("--pairs", type=positive, default=8, help="of the batch (default: 8)")
    parser.add_argument("--longest", type=positive, default=1024, help="tokens of a text taken")
    parser.add_argument(
        "--prompt-share", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
        help="of a pair's tokens, with two copies of the prompt; only such pairs (default: all)",
    )  # fmt: skip
    parser.add_argument("--micro-batch-size", type=positive, default=2, help="ours (default: 2)")
    parser.add_argument("--peer-batch", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--steps", type=positive, default=1, help="timed a run (default: 1)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--bf16", action="store_true", help="(default: float32)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--methods", nargs="+", help="some of them (default: all)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(measure_step(args.only, job(args))))
        return
    prompts, responses = prepare(args)
    methods = [name for name in (*OURS, TRL, LIGER) if name == TRL or installed(name)]
    found = alternate(args.methods or methods, args.rounds)
    for name, runs in found.items():
        for result in runs:
            flops = model_operations(job(args), shared=name == "shared prompt")
            result["pairs"] = args.pairs / result["seconds"]
            result["share"] = flops / result["seconds"] / result["peak"]
    peaks = [result["peak"] / 1e9 for runs in found.values() for result in runs]
    print(
        f"{args.pairs} pairs: {2 * prompts} prompt tokens ({prompts} shared), {responses} of "
        f"responses; {'bfloat16' if args.bf16 else 'float32'}, {args.threads} threads, medians of "
        f"{args.rounds}; large products reach {min(peaks):.0f} to {max(peaks):.0f} GFLOP/s"
    )
    columns = {"pairs/s": "pairs", "of matmul": "share", "first loss": "loss"}
    table(found, TRL if TRL in found else next(iter(found)), columns)


def prepare(args: argparse.Namespace) -> tuple[int, int]:
    """Import the model and write pairs with log-probs of nobody; tokens of prompts, responses."""
    from megatron_infifpo.convert.hf_import import import_checkpoint

    low, high = args.prompt_share
    tokenizer, records = ChatTokenizer.from_pretrained(args.model), []
    for record in read_records(args.input):
        tokens = tokenizer.encode(record)
        prompt, responses = len(tokens.prompt_ids), [len(ids) for ids in tokens.response_ids]
        share = 2 * prompt / (2 * prompt + sum(responses))
        if prompt + max(responses) <= args.longest and low <= share <= high:
            records.append(record)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not (args.folder / "pivot").exists():
        import_checkpoint(args.model, args.folder / "pivot")
    data = write_pairs(records[: args.pairs], tokenizer, args.folder)
    return int(data.prompt_lengths.sum()), int(data.response_lengths.sum())


def job(args: argparse.Namespace) -> StepJob:
    """What one run measures."""
    return StepJob(
        model=str(args.model),
        folder=str(args.folder),
        pairs=args.pairs,
        longest=args.longest,
        micro_batch=args.micro_batch_size,
        peer_batch=args.peer_batch,
        steps=args.steps,
        bf16=args.bf16,
    )


if __name__ == "__main__":
    run(main)
