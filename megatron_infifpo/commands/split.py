"""Split preference records in two files, for SFT and for preference optimization after it.

    infifpo split --input all.jsonl --sft sft.jsonl --preference pairs.jsonl

Which file a record goes to depends on its prompt and the seed alone, so the split is the same in
every run, records of one prompt stay together, and adding records moves no other.
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.flags import add_record_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a split."""
    add_record_flags(parser)
    parser.add_argument("--sft", required=True, type=Path, metavar="FILE", help=".jsonl to write")
    parser.add_argument(
        "--preference", required=True, type=Path, metavar="FILE", help=".jsonl to write"
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="expected share of SFT prompts (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write both files."""
    from megatron_infifpo.records.split import split_records

    sft, preference = split_records(
        args.input,
        args.sft,
        args.preference,
        share=args.share,
        seed=args.seed,
        on_bad=args.on_bad_record,
        lists=args.lists,
    )
    print(f"{args.sft}: {sft} records; {args.preference}: {preference} records")
