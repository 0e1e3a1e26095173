#!/usr/bin/env python
"""Score every response of preference records under one model, into a log-prob dataset.

The model speaks its own language: its tokenizer, its chat template. Run it alone or on many ranks;
rerun the same command after an interruption and finished shards are kept.

    python tools/score_source.py --backend transformers --model qwen2.5-14b-instruct \\
        --input train.jsonl --output logprobs/qwen

    torchrun --nproc-per-node 8 tools/score_source.py --backend megatron --model pivot \\
        --tensor-model-parallel-size 2 --bf16 --input train.jsonl --output logprobs/pivot
"""

import argparse

from megatron_infifpo.cli import run
from megatron_infifpo.scoring.score import BACKENDS, score


def main() -> None:
    """Parse the command line and score."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend",
        choices=list(BACKENDS),
        required=True,
        help="megatron: tensor and pipeline parallel, packed rows; transformers: any causal LM",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR",
        help="Hugging Face folder or (megatron) converted checkpoint",
    )
    parser.add_argument(
        "--input", required=True, nargs="+", metavar="FILE", help="preference records, in order"
    )
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="of the log-prob dataset to write"
    )
    parser.add_argument("--name", help="the model's name in the manifest (default: its folder)")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument(
        "--bf16", action="store_true", help="weights in bfloat16 (default: float32)"
    )
    parser.add_argument(
        "--row-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="tokens of a packed row (default: 8192)",
    )
    parser.add_argument(
        "--shard-records",
        type=int,
        default=512,
        metavar="N",
        help="records of a shard, the unit of work and of resuming (default: 512)",
    )
    parser.add_argument(
        "--on-bad-record",
        choices=("error", "skip"),
        default="error",
        help="what to do with a malformed record; the same as for prepare_preferences.py",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    score(parser.parse_args())


if __name__ == "__main__":
    run(main)
