"""Fuse models into a pivot, from Hugging Face to Hugging Face: a whole run in one command.

    infifpo fuse run.yaml
    infifpo fuse --pivot models/phi-4 --source models/qwen --source code=models/qwen-coder \\
        --pairs pairs.jsonl --output runs/phi4

run.yaml says what a run is (infifpo init writes one, infifpo show explains it). Layouts are chosen
for the GPUs that are there; records are split and tokenized, the sources scored, the pivot trained,
exported, checked and compared. A stage is skipped where what it makes is there and of the same
words and inputs: give the same command again after an interruption, wherever that was. What has
changed since is refused, until --redo puts the old away. --executor slurm submits a chain of jobs.
"""

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from megatron_infifpo.commands.main import make_parser
from megatron_infifpo.errors import UserError
from megatron_infifpo.ranks import rank

FLAGS = ("pivot", "pairs", "output")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, or what it would say, and what is done."""
    parser.add_argument("file", nargs="?", metavar="RUN.yaml", help="what the run is")
    parser.add_argument("--pivot", metavar="DIR", help="without a file: Hugging Face folder")
    parser.add_argument(
        "--source", action="append", default=[], metavar="[DOMAIN,...=]DIR",
        help="without a file: of a source, for records of these domains (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", nargs="+", metavar="FILE", help="without a file: preference records"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: the file's)")
    parser.add_argument(
        "--executor", choices=("local", "slurm"), help="where it runs (default: the file's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument(
        "--redo", nargs="+", default=[], metavar="STAGE",
        help="put away what these stages made, and all that follows from them; make it again",
    )  # fmt: skip
    parser.add_argument("--only", metavar="STAGE", help="run one stage, whose inputs are there")
    parser.add_argument(
        "--here", action="store_true",
        help="with --only: as one of the stage's ranks, which srun or torchrun has started",
    )  # fmt: skip


def read(args: argparse.Namespace) -> tuple[Any, str | None]:
    """Return the run, and its file where there is one.

    Raises:
        UserError: it is wrong, or there are both a file and flags in place of it.
    """
    from megatron_infifpo.run.reading import make_run, read_run
    from megatron_infifpo.run.start import run_of_flags

    given = [f"--{name}" for name in ("pivot", "source", "pairs") if getattr(args, name)]
    if args.file is not None and given:
        raise UserError(
            f"{', '.join(given)} and {args.file}: expected a file, or what it would say"
        )
    if args.file is None:
        if missing := [f"--{name}" for name in FLAGS if not getattr(args, name)]:
            raise UserError(f"expected RUN.yaml, or {', '.join(missing)}, too")
        content = run_of_flags(
            pivot=args.pivot, sources=args.source, pairs=args.pairs, output=args.output
        )
        run = make_run(content, "these flags")
    else:
        run = read_run(args.file)
    if args.output is None and args.executor is None:
        return run, args.file
    # With other values than the file's it is another run, which is kept as its folder's run.yaml.
    content = run.model_dump(exclude_unset=True)
    content["output"] = args.output or run.output
    if args.executor:
        content["cluster"] = content.get("cluster", {}) | {"executor": args.executor}
    return make_run(content, args.file or "these flags"), None


def run(args: argparse.Namespace) -> int:
    """Run, submit, or print."""
    from megatron_infifpo.recipes.ends import StageError, StoppedError
    from megatron_infifpo.run.driver import redo, run_here, run_stages, shown
    from megatron_infifpo.run.outcome import outcome
    from megatron_infifpo.run.slurm import submit
    from megatron_infifpo.run.start import can_report, keep, plan

    if args.here and args.only is None:
        raise UserError("--here has no effect without --only")
    what, file = read(args)
    stages = plan(what)
    if not args.here:  # whoever started the ranks has done so
        check_words(what, stages, file)
    slurm = what.cluster.executor == "slurm" and args.only is None
    if args.dry_run:
        if slurm:
            submit(what, stages, Path(what.output) / "run.yaml", dry_run=True)
            return 0
        for stage in stages:
            print(shown(what, stage.job))
        return 0
    if args.redo:
        redo(what, stages, args.redo)
    if args.only is None:
        kept = keep(what, file)
    if slurm:
        jobs = submit(what, stages, kept)
        print("\n".join(f"{name}: job {job}" for name, job in jobs.items()) or "all is done")
        print(f"follow with: infifpo status {kept}")
        return 0
    try:
        if args.here:
            run_here(what, stages, args.only, rank())
        else:
            run_stages(what, stages, only=args.only)
    except StoppedError as error:
        print(error, file=sys.stderr, flush=True)
        return error.code
    except StageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    if args.only is None:
        print(outcome(what, stages), flush=True)
        if not can_report():
            print("no pages about trainings: pip install 'megatron-infifpo[report]'")
    return 0


def check_words(run: Any, stages: Any, file: str | None) -> None:
    """Let every command read its words, before the first one has run for hours.

    Raises:
        UserError: one of them cannot; says where in the file they stand.
    """
    from megatron_infifpo.run.places import place_of, where

    for stage in stages:
        name, *words = stage.job.arguments
        with warnings.catch_warnings(action="ignore"):  # of what Megatron misses, at every import
            module, parser = make_parser(name)

        def error(message: str, name: str = stage.name) -> NoReturn:
            raise UserError(f"{where(place_of(run, name), file)}: the stage {name}: {message}")

        parser.error = error  # type: ignore[method-assign]
        getattr(module, "parse", argparse.ArgumentParser.parse_args)(parser, words)
