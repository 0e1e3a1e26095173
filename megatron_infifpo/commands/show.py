"""Show a run in full: every field of run.yaml, and what it is where the file does not say.

    infifpo show run.yaml
    infifpo show --schema > run.schema.json      # for editors, which complete and check with it
    eval "$(infifpo show run.yaml --shell)"      # for the scripts in examples/slurm

It is checked first: whatever is wrong is said with file and line.
"""

import argparse

from megatron_infifpo.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file, and the forms in which it is shown."""
    parser.add_argument("file", nargs="?", metavar="RUN.yaml")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", action="store_true", help="the JSON Schema of such files")
    form.add_argument("--shell", action="store_true", help="as variables of examples/slurm/env.sh")


def run(args: argparse.Namespace) -> None:
    """Print it.

    Raises:
        UserError: there is no file, or it is wrong.
    """
    from megatron_infifpo.run import show
    from megatron_infifpo.run.reading import read_run

    if args.schema:
        print(show.schema(), end="")
        return
    if args.file is None:
        raise UserError("expected RUN.yaml, or --schema")
    what = read_run(args.file)
    print(show.as_shell(what) if args.shell else show.as_yaml(what, defaults=True), end="")
