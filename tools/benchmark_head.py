#!/usr/bin/env python
"""Compare the log-prob head with full logits: time and memory of forward and backward.

    python tools/benchmark_head.py --hidden 5120 --vocabulary 100352 --rows 4096

One product of rows and output weight gives the logits, two the gradients; the head computes the
first again in the backward pass, so four products to three are the floor of its time. It is also
measured at 16 more ids a row, and with its own 10 most probable ones. Liger's fused
DPO loss, where it is installed, has the rows as pairs of --response rows each; it takes a pair at
a time and makes its gradients at once. Memory is counted beyond what all methods need: rows,
weight, and their gradients, the weight's in float32 as Megatron keeps it.
"""

import argparse
import importlib.util
import json
import os

import torch

from megatron_infifpo.bench.head import FULL, LIGER, METHODS, HeadJob, measure_head
from megatron_infifpo.bench.jobs import alternate, table
from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive


def main() -> None:
    """Run every method in turn and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=positive, default=5120, help="(default: 5120, Phi-4)")
    parser.add_argument("--vocabulary", type=positive, default=100352, help="(default: 100352)")
    parser.add_argument("--rows", type=positive, default=4096, help="(default: 4096)")
    parser.add_argument("--response", type=positive, default=256, help="(default: 256)")
    parser.add_argument("--rounds", type=positive, default=5, help="(default: 5)")
    parser.add_argument("--bf16", action="store_true", help="(default: float32)")
    parser.add_argument("--threads", type=positive, default=os.cpu_count(), help="of the CPU")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        torch.set_num_threads(args.threads)
        job = HeadJob(args.rows, args.hidden, args.vocabulary, args.response, args.bf16)
        print(json.dumps(measure_head(args.only, job)))
        return
    if args.rows % (2 * args.response):
        raise UserError(f"--rows {args.rows}: expected pairs of {args.response} rows each")
    print(
        f"{args.rows} rows, hidden {args.hidden}, vocabulary {args.vocabulary}, "
        f"{'bfloat16' if args.bf16 else 'float32'}, medians of {args.rounds}"
    )
    there = importlib.util.find_spec("liger_kernel")
    methods = [name for name in METHODS if name != LIGER or there]
    table(alternate(methods, args.rounds), FULL, {"mean log-prob": "mean"})


if __name__ == "__main__":
    run(main)
