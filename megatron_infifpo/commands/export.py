"""Convert a Megatron checkpoint, imported or trained, into a Hugging Face folder.

    infifpo export --load ckpt/run --save phi-4-fused

It works tensor by tensor, without a GPU. Ranks of torchrun share the files.
"""

import argparse

from megatron_infifpo.commands.import_ import DTYPES, add_dtype
from megatron_infifpo.flag_types import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an export."""
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="imported or trained, at any parallel layout"
    )
    parser.add_argument("--save", required=True, metavar="DIR", help="new folder")
    add_dtype(parser)
    add_iteration(parser)


def add_iteration(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which of a run's checkpoints it is."""
    parser.add_argument(
        "--iteration", type=whole(0), metavar="N", help="training iteration (default: the latest)"
    )


def run(args: argparse.Namespace) -> None:
    """Export."""
    import torch

    from megatron_infifpo.convert.hf_export import export_checkpoint

    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    export_checkpoint(args.load, args.save, dtype, args.iteration)
    print(f"{args.load} -> {args.save}")
