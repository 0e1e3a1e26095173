"""Write a run.yaml, with a comment on everything that it can say.

    infifpo init run.yaml --pivot models/phi-4 --source models/qwen \\
        --source code=models/qwen-coder --pairs pairs.jsonl --output runs/phi4

What no flag says is asked for on a terminal. infifpo fuse run.yaml makes the run.
"""

import argparse
import sys
from pathlib import Path

from megatron_infifpo.errors import UserError

QUESTIONS = {
    "pivot": "Hugging Face folder of the pivot, the model that is trained",
    "source": "a source, [DOMAIN,...=]DIR of its Hugging Face folder",
    "pairs": "a file of preference records",
    "output": "folder of the run",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is asked for."""
    parser.add_argument("file", nargs="?", type=Path, default=Path("run.yaml"), metavar="RUN.yaml")
    parser.add_argument("--pivot", metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--source", action="append", metavar="[DOMAIN,...=]DIR",
        help="Hugging Face folder, for records of these domains (default: all)",
    )  # fmt: skip
    parser.add_argument("--pairs", nargs="+", metavar="FILE", help="preference records")
    parser.add_argument("--output", metavar="DIR", help="folder of the run")


def run(args: argparse.Namespace) -> None:
    """Ask for what is missing, and write the file.

    Raises:
        UserError: nobody can be asked, or the file is there.
    """
    from megatron_infifpo.run.init import ask, commented, write_new
    from megatron_infifpo.run.start import run_of_flags

    if args.file.exists():
        raise UserError(f"{args.file} is there already: choose another name, or delete it")
    found = {name: getattr(args, name) for name in QUESTIONS}
    missing = [name for name, value in found.items() if value is None]
    if missing and not sys.stdin.isatty():
        flags = ", ".join(f"--{name}" for name in missing)
        raise UserError(f"expected {flags}, too: there is no terminal to ask on")
    for name in missing:
        several = name in ("source", "pairs")
        answer = ask(QUESTIONS[name], several=several)
        found[name] = answer if several else answer[0]
    content = run_of_flags(
        pivot=found["pivot"], sources=found["source"], pairs=found["pairs"], output=found["output"]
    )
    write_new(args.file, commented(content, args.file.name))
    print(f"{args.file}: edit it, then: infifpo fuse {args.file}")
