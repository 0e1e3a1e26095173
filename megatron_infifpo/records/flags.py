"""Flags of every command that reads preference records."""

import argparse

from megatron_infifpo.records.records import ON_BAD


def add_record_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which records to read."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="FILE",
        help="preference records, in order: .jsonl, .json, .csv (also .gz, .zst), .parquet, or "
        "folders that datasets saved (docs/file-formats.md)",
    )
    parser.add_argument(
        "--on-bad-record",
        choices=ON_BAD,
        default="error",
        help="stop at the first malformed record, or leave such records out, then in every "
        "command (default: error)",
    )
