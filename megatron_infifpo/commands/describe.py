"""Print what a checkpoint is: format, family, sizes, dtype, and the flags that it needs.

    infifpo describe --load ckpt/phi-4

Weights are not read, only what their files say of them.
"""

import argparse

from megatron_infifpo.commands.export import add_architecture, add_iteration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which checkpoint."""
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="Megatron checkpoint or Hugging Face folder"
    )
    add_architecture(parser)
    add_iteration(parser)


def run(args: argparse.Namespace) -> None:
    """Print a line a fact."""
    from megatron_infifpo.convert.summary import describe

    for name, value in describe(args.load, args.iteration, args.hf).items():
        print(f"{name:<12} {value}")
