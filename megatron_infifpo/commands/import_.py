"""Convert a Hugging Face folder into a Megatron checkpoint, tensor by tensor, without a GPU.

    infifpo import --hf phi-4 --save ckpt/phi-4 --dtype bf16

Ranks of torchrun share the layers.
"""

import argparse

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of an import."""
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="config.json, safetensors, tokenizer"
    )
    parser.add_argument(
        "--save", required=True, metavar="DIR", help="new folder; Megatron loads it with --load"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="a PEFT folder of adapters, to merge into the weights"
    )
    add_dtype(parser)


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the flag that says which dtype weights are written in."""
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="of the weights written (default: the original's)"
    )


def run(args: argparse.Namespace) -> None:
    """Import."""
    import torch

    from megatron_infifpo.convert.hf_import import import_checkpoint

    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    import_checkpoint(args.hf, args.save, dtype, args.adapter)
    print(f"{args.hf} -> {args.save}")
