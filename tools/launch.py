#!/usr/bin/env python
"""List, show and start the stages of a run, here or on a cluster.

    python tools/launch.py list
    python tools/launch.py show infifpo method=dpo
    python tools/launch.py infifpo --executor slurm --nodes 2 method=infifpo beta=2.5
    python tools/launch.py pipeline --executor slurm --nodes 2 slurm.account=research

NAME is a stage, `baselines` (preference training by every other method), or `pipeline` (all stages,
each after those that it needs). Options are NAME=VALUE; `show` explains them. Several flags are one
value: 'flags=--seed 7 --lr 1e-6', with quotes inside as the shell has them. `--executor here`
becomes the command itself, on this rank: sbatch scripts start their stages so, under srun. The
others are nemo-run's (`pip install megatron-infifpo[recipes]`): local, slurm, and a site's own,
whose options are written EXECUTOR.NAME=VALUE.
"""

import argparse
import inspect
import math
import os
import sys
from typing import Any

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive
from megatron_infifpo.recipes.commands import BASELINES, STAGES, Job, split_words

SEVERAL = {
    "baselines": "Train by every other method: " + ", ".join(BASELINES) + ".",
    "pipeline": "All stages: convert, prepare, sft, score, infifpo, export.",
}


def main() -> int:
    """Parse the command line; list, show or start."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="list, show, a stage, baselines, or pipeline")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="of the stage")
    parser.add_argument(
        "--options",
        metavar="WORDS",
        dest="words",
        help="several NAME=VALUE in one string, quoted as for a shell",
    )
    parser.add_argument("--executor", default="here", help="(default: here)")
    parser.add_argument("--nodes", type=positive, default=1, help="(default: 1)")
    parser.add_argument("--ranks", type=positive, default=8, help="of a node (default: 8)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("--detach", action="store_true", help="submit, and do not wait for the end")
    args = parser.parse_intermixed_args(spread(sys.argv[1:]))
    if args.name == "list":
        for name in (*STAGES, *SEVERAL):
            print(f"{name:<12}{SEVERAL.get(name) or summary(name)}")
        return 0
    if args.name == "show":
        show(args.options)
        return 0
    if args.name not in (*STAGES, *SEVERAL):
        raise UserError(f"there is no stage {args.name!r}, expected list, show, {choices()}")
    given = [option for option in args.options if "." not in option.partition("=")[0]]
    options = read_options(args.name, given)
    site = [option for option in args.options if option not in given]
    if args.executor == "here":
        unused = [*site, *(["--nodes"] if args.nodes > 1 else []), *(["--detach"] * args.detach)]
        if unused:
            raise UserError(f"{', '.join(unused)} has no effect here: choose an --executor")
        if args.name in SEVERAL:
            raise UserError(f"{args.name} is several commands: choose an --executor, or a stage")
        start_here(STAGES[args.name](**options), dry_run=args.dry_run)
        return 0
    return launch(args, options, site)


def spread(words: list[str]) -> list[str]:
    """Put the words of every --options=WORDS in its place: what is given twice, counts last.

    Raises:
        UserError: a quote that is not closed.
    """
    found: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, text = word.partition("=")
        if name == "--options":
            found += split_words(text if equals else next(rest, ""), name)
        else:
            found.append(word)
    return found


def choices() -> str:
    """All names, for messages."""
    return ", ".join((*STAGES, *SEVERAL))


def summary(name: str) -> str:
    """First line of a stage's documentation."""
    return (STAGES[name].__doc__ or "").splitlines()[0]


def show(options: list[str]) -> None:
    """Print a stage's documentation, and its command line.

    Raises:
        UserError: no such stage.
    """
    name = options[0] if options else ""
    if name not in STAGES:
        raise UserError(f"show {name}: expected one of {', '.join(STAGES)}")
    stage = STAGES[name]
    print(inspect.getdoc(stage))
    print("\nDefaults: " + ", ".join(f"{p}" for p in inspect.signature(stage).parameters.values()))
    print(f"\n{stage(**read_options(name, options[1:]))}")


def read_options(name: str, texts: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE as the stage's parameters have them.

    Raises:
        UserError: not of that form, unknown, or of another type.
    """
    stage = STAGES["infifpo" if name in SEVERAL else name]
    known = dict(inspect.signature(stage).parameters)
    if name == "baselines":
        del known["method"]
    if name == "pipeline":
        del known["initial"]
        known["hf"] = inspect.signature(STAGES["convert"]).parameters["hf"]
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in known:
            raise UserError(f"{text}: expected NAME=VALUE, NAME one of {', '.join(known)}")
        found[key] = read_value(
            text, value, known[key].annotation, least=0 if key == "index" else 1
        )
    return found


def read_value(text: str, value: str, kind: Any, *, least: int = 1) -> Any:
    """Read VALUE of the option NAME=VALUE.

    Args:
        text: the option, for messages.
        value: what it is given.
        kind: annotation of the parameter.
        least: the smallest whole number that makes sense.

    Raises:
        UserError: it is not of that kind.
    """
    if kind in (str, str | None):
        return value
    if kind is bool:
        if value.lower() not in ("true", "false"):
            raise UserError(f"{text}: expected true or false")
        return value.lower() == "true"
    if kind in (float | None, int | None) and value in ("", "None"):
        return None
    whole = kind in (int, int | None)
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        number = -math.inf
    if whole and number < least:
        raise UserError(f"{text}: expected a whole number of at least {least}")
    if not (whole or 0 < number < math.inf):  # NaN is neither
        raise UserError(f"{text}: expected a number above 0")
    return number


def start_here(job: Job, *, dry_run: bool) -> None:
    """Become the job's command."""
    if dry_run or os.environ.get("SLURM_PROCID", "0") == "0":
        print(job, flush=True)
    if not dry_run:
        os.execv(sys.executable, [sys.executable, *job.arguments])


def read_site_options(name: str, texts: list[str]) -> dict[str, Any]:
    """Read EXECUTOR.NAME=VALUE; numbers where the executor's parameter is one.

    Raises:
        UserError: of another executor, or not a number.
    """
    from megatron_infifpo.recipes.executors import EXECUTORS

    known = inspect.signature(EXECUTORS[name]).parameters if name in EXECUTORS else {}
    found: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        prefix, _, key = path.partition(".")
        if prefix != name or not equals:
            raise UserError(f"{text}: expected {name}.NAME=VALUE")
        digits = int(value) if value.isdigit() else value  # where nobody says what it is
        kind = known[key].annotation if key in known else None
        found[key] = read_value(text, value, kind, least=0) if kind else digits
    return found


def launch(args: argparse.Namespace, options: dict[str, Any], site: list[str]) -> int:
    """Start by nemo-run; return 1 if a job failed while it was waited for.

    Raises:
        UserError: nemo-run is not installed, or an executor's option is not one.
    """
    try:
        import nemo_run

        from megatron_infifpo.recipes import tasks
        from megatron_infifpo.recipes.executors import executor
    except ImportError as error:
        raise UserError(
            f"--executor {args.executor} needs nemo-run ({error}): "
            "pip install 'megatron-infifpo[recipes]'"
        ) from None
    chosen = read_site_options(args.executor, site)
    every_rank = executor(args.executor, args.nodes, args.ranks, **chosen)
    alone = executor(args.executor, 1, 1, **chosen)
    if args.name == "pipeline":
        experiment = tasks.infifpo_pipeline(alone, every_rank, **options)
    else:
        if args.name == "baselines":
            made, where = tasks.baselines(**options), every_rank
        else:
            job = STAGES[args.name](**options)
            made, where = (
                {tasks.title(job): tasks.task(job)},
                every_rank if job.every_rank else alone,
            )
        experiment = nemo_run.Experiment(args.name)
        with experiment:
            for name, task in made.items():
                experiment.add(task, executor=where.clone(), name=name)
    with experiment:
        if args.dry_run:
            experiment.dryrun()
            return 0
        experiment.run(detach=args.detach)
    failed = [job.id for job in experiment.jobs if job.state.name in ("FAILED", "CANCELLED")]
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are named above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
