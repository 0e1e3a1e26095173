"""Prove the program on this machine's GPUs, and measure it: one table, one file, one exit code.

    infifpo gpu-check --json gpu-check.json

Nine groups of checks run, each in a process of its own with a time limit, so that one failure or
hang does not hide the rest; those that measure run alone. --device cpu runs every part that can run
without a GPU. Exit code 0: all passed; 1: something failed; 2: CUDA cannot be used. See
docs/gpu-check.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive
from megatron_infifpo.gpu_check.records import Options
from megatron_infifpo.gpu_check.report import machine, summary, table, write_json
from megatron_infifpo.gpu_check.runner import GROUPS, run_groups
from megatron_infifpo.gpu_check.shapes import SHAPES

DEFAULT_SHAPES = {"cuda": ("0.5b", "7b"), "cpu": ("tiny",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is checked, and where."""
    parser.add_argument("--quick", action="store_true", help="fewer and smaller checks")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="(default: cuda)")
    parser.add_argument(
        "--only", nargs="+", choices=[group.name for group in GROUPS], metavar="GROUP",
        help=f"some of {', '.join(group.name for group in GROUPS)}; the environment comes first "
        "always",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found")
    parser.add_argument(
        "--model-shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE",
        help=f"models to measure with random weights, of {', '.join(SHAPES)} (default: 0.5b 7b; on "
        "a CPU tiny)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=positive, metavar="SECONDS", help="of every group (default: its own)"
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR",
        help="for temporary files, up to 30 GB with 7b (default: the system's)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Run the groups, print the table, write the file."""
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no folder {args.json.absolute().parent}")
    groups = [group for group in GROUPS if args.only is None or group.name in args.only]
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=args.folder) as folder:
        options = Options(
            device=args.device,
            quick=args.quick,
            devices=0,
            shapes=tuple(args.model_shapes or DEFAULT_SHAPES[args.device]),
            folder=folder,
            seconds=0.0,
        )
        outcome = run_groups(groups, options, seconds=args.timeout)
    if args.json is not None:
        write_json(args.json, outcome, sys.argv)
    print(machine(outcome.facts))
    if outcome.unusable is not None:
        print(f"error: {outcome.unusable}", file=sys.stderr)
    else:
        print(f"\n{table(outcome.checks)}\n\n{summary(outcome)}")
    return outcome.exit_code
