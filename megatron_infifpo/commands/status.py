"""Say how a run stands: every stage, how far it is, how long it takes yet, and its SLURM job.

infifpo status run.yaml
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the run."""
    parser.add_argument(
        "file", metavar="RUN.yaml", help="as infifpo fuse was given it, or OUT/run.yaml"
    )
    parser.add_argument("--output", metavar="DIR", help="folder of the run (default: the file's)")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    from megatron_infifpo.run.reading import read_run
    from megatron_infifpo.run.start import plan
    from megatron_infifpo.run.status import status

    what = read_run(args.file)
    if args.output:
        what = what.model_copy(update={"output": args.output})
    print("\n".join(status(what, plan(what))))
