"""Flags of the commands that write responses, judge them, and ask models."""

import argparse
from pathlib import Path

from megatron_infifpo.commands.flags import hidden_alias
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.records import ON_BAD


def add_response_flags(
    parser: argparse.ArgumentParser, *, input_form: str, bad: str, bf16: str, batch: str, cut: str
) -> None:
    """Add what is read and written, and how a model is run on it.

    Args:
        parser: of a command.
        input_form: what a word of --input is.
        bad: what is malformed, after "stop at the first".
        bf16, batch, cut: help of --bf16, --batch and --keep-cut.
    """
    parser.add_argument("--input", required=True, nargs="+", metavar=input_form)
    parser.add_argument(
        "--on-bad-record",
        choices=ON_BAD,
        default="error",
        help=f"stop at the first {bad} out (default: error)",
    )
    parser.add_argument("--bf16", action="store_true", help=bf16)
    parser.add_argument("--batch", type=positive, default=8, help=f"{batch} (default: 8)")
    parser.add_argument("--keep-cut", action="store_true", help=f"{cut} (default: left out)")


def add_output_flag(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the file to write."""
    parser.add_argument("--output", type=Path, required=required, metavar="FILE", help=".jsonl")


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Add what vLLM has beside other engines."""
    new = "--tensor-model-parallel-size"
    parser.add_argument(new, type=positive, default=1, metavar="N", help="of vLLM (default: 1)")
    hidden_alias(parser, "--tensor-parallel-size", new)
