"""Flags of the commands that write responses, judge them, and ask models."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_infifpo.commands.flags import hidden_alias
from megatron_infifpo.flag_types import positive
from megatron_infifpo.records.records import ON_BAD


def add_response_flags(
    parser: argparse.ArgumentParser,
    *,
    input_form: str,
    bad: str,
    bf16: str,
    batch: str,
    cut: str,
    output_required: bool = True,
) -> None:
    """Add what is read and written, and how a model is run on it.

    Args:
        parser: of a command; a job of it has the defaults.
        input_form: what a word of --input is.
        bad: what is malformed, after "stop at the first".
        bf16, batch, cut: help of --bf16, --batch and --keep-cut.
        output_required: whether --output is.
    """
    parser.add_argument("--input", required=True, nargs="+", metavar=input_form)
    parser.add_argument(
        "--on-bad-record",
        choices=ON_BAD,
        help=f"stop at the first {bad} out (default: %(default)s)",
    )
    parser.add_argument(
        "--output", type=Path, required=output_required, metavar="FILE", help=".jsonl"
    )
    parser.add_argument("--bf16", action="store_true", help=bf16)
    parser.add_argument("--batch", type=positive, help=f"{batch} (default: %(default)s)")
    parser.add_argument("--keep-cut", action="store_true", help=f"{cut} (default: left out)")


def add_engine_flags(parser: argparse.ArgumentParser, engines: Sequence[str]) -> None:
    """Add what runs a model, and what vLLM has beside others."""
    parser.add_argument("--engine", choices=engines, help="(default: %(default)s)")
    flag = "--tensor-model-parallel-size"
    parser.add_argument(flag, type=positive, metavar="N", help="of vLLM (default: %(default)s)")
    hidden_alias(parser, "--tensor-parallel-size", flag)
