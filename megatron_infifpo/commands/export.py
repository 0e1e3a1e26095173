"""Convert a Megatron checkpoint, imported or trained, into a Hugging Face folder.

    infifpo export --load ckpt/run --save phi-4-fused

It works tensor by tensor, without a GPU. Ranks of torchrun share the files. Low-rank adapters are
merged into their base; --adapter-only writes them as a folder for PEFT.
"""

import argparse

from megatron_infifpo.commands.import_ import DTYPES, add_dtype
from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an export."""
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="imported or trained, at any parallel layout"
    )
    parser.add_argument("--save", required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--adapter-only",
        action="store_true",
        help="write the adapters of a run with --lora-rank, for PEFT, and not its model",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="of adapters, where it is no longer where training read it"
    )
    add_architecture(parser)
    add_dtype(parser)
    add_iteration(parser)


def add_architecture(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says what a checkpoint of another program is."""
    parser.add_argument(
        "--hf",
        metavar="DIR",
        help="Hugging Face folder of the same model, for a checkpoint of Megatron-LM, "
        "Megatron-Bridge or NeMo, which carries none",
    )


def add_iteration(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which of a run's checkpoints it is."""
    parser.add_argument(
        "--iteration", type=whole(0), metavar="N", help="training iteration (default: the latest)"
    )


def run(args: argparse.Namespace) -> None:
    """Export."""
    import torch

    from megatron_infifpo.convert.hf_export import export_checkpoint
    from megatron_infifpo.convert.peft import export_adapter

    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    if args.adapter_only:
        if dtype is not None:
            raise UserError("--dtype has no effect with --adapter-only: they stay as they are")
        export_adapter(args.load, args.save, args.iteration, args.base)
    else:
        export_checkpoint(args.load, args.save, dtype, args.iteration, base=args.base, hf=args.hf)
    print(f"{args.load} -> {args.save}")
