"""Write what Megatron-Bridge needs to read a checkpoint: its run_config.yaml.

    infifpo bridge-config --load ckpt/run

The file goes into the iteration's folder, which Megatron-Bridge then loads: its model, in the dtype
of its weights, with the tokenizer that the checkpoint carries.
"""

import argparse

from megatron_infifpo.commands.export import add_iteration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which checkpoint."""
    parser.add_argument("--load", required=True, metavar="DIR", help="imported or trained")
    add_iteration(parser)


def run(args: argparse.Namespace) -> None:
    """Write the file."""
    from megatron_infifpo.convert.bridge import write_run_config

    print(f"wrote {write_run_config(args.load, args.iteration)}")
