"""List, show and start the stages of a run, here or on a cluster.

    infifpo launch list
    infifpo launch show infifpo method=dpo
    infifpo launch infifpo --executor slurm --nodes 2 method=infifpo beta=2.5
    infifpo launch pipeline --executor slurm --nodes 2 slurm.account=research

NAME is a stage, `baselines` (preference training by every other method), `pipeline` (all stages,
each after those that it needs), or `fusion` (token-level fusion by three methods). Options are
NAME=VALUE; `show` explains them. Several flags are one value: 'flags=--seed 7 --lr 1e-6', with
quotes inside as the shell has them. `--executor here` becomes the command itself, on this rank:
sbatch scripts start their stages so, under srun. The others are nemo-run's (`pip install
megatron-infifpo[recipes]`): local, slurm, and a site's own, whose options are written
EXECUTOR.NAME=VALUE.
"""

import argparse
import inspect
from collections.abc import Sequence

from megatron_infifpo.commands.flags import take_defaults
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import positive
from megatron_infifpo.recipes.commands import STAGES
from megatron_infifpo.recipes.launch import Launch, launch
from megatron_infifpo.recipes.options import SEVERAL, read_options, spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what is started, and where."""
    parser.add_argument("name", help="list, show, a stage, baselines, pipeline, or fusion")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE", help="of the stage")
    parser.add_argument(
        "--options",
        metavar="WORDS",
        dest="words",
        help="several NAME=VALUE in one string, quoted as for a shell",
    )
    parser.add_argument("--executor", help="(default: %(default)s)")
    parser.add_argument("--nodes", type=positive, help="(default: %(default)s)")
    parser.add_argument("--ranks", type=positive, help="of a node (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("--detach", action="store_true", help="submit, and do not wait for the end")
    take_defaults(parser, Launch)


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse words in which flags and options may be mixed."""
    return parser.parse_intermixed_args(spread(words))


def run(args: argparse.Namespace) -> int:
    """List, show or start.

    Raises:
        UserError: there is no such stage, or an option is none of its.
    """
    if args.name == "list":
        for name in (*STAGES, *SEVERAL):
            what = SEVERAL.get(name) or (STAGES[name].__doc__ or "").splitlines()[0]
            print(f"{name:<12}{what}")
        return 0
    if args.name == "show":
        show(args.options)
        return 0
    if args.name not in (*STAGES, *SEVERAL):
        choices = ", ".join((*STAGES, *SEVERAL))
        raise UserError(f"there is no stage {args.name!r}, expected list, show, {choices}")
    given = [option for option in args.options if "." not in option.partition("=")[0]]
    job = Launch(
        args.name,
        read_options(args.name, given),
        executor=args.executor,
        site=tuple(option for option in args.options if option not in given),
        nodes=args.nodes,
        ranks=args.ranks,
        dry_run=args.dry_run,
        detach=args.detach,
    )
    return launch(job)


def show(options: Sequence[str]) -> None:
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
