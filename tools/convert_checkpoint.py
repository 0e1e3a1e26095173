#!/usr/bin/env python
"""Convert checkpoints between Hugging Face and Megatron, tensor by tensor, without a GPU.

    python tools/convert_checkpoint.py import --hf phi-4 --save ckpt/phi-4 --dtype bf16
    python tools/convert_checkpoint.py inspect --load ckpt/phi-4
    torchrun --nproc-per-node 2 tools/convert_checkpoint.py verify --hf phi-4 --load ckpt/phi-4 \\
        --tensor-model-parallel-size 2 --bf16
    python tools/convert_checkpoint.py export --load ckpt/run --save phi-4-fused
"""

import argparse
from typing import Any

import torch

from megatron_infifpo.commands.entry import run
from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.hf_import import import_checkpoint
from megatron_infifpo.convert.summary import describe
from megatron_infifpo.flag_types import positive, real, whole

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def do_import(args: argparse.Namespace) -> None:
    """Hugging Face -> Megatron."""
    import_checkpoint(args.hf, args.save, DTYPES.get(args.dtype))
    print(f"{args.hf} -> {args.save}")


def do_export(args: argparse.Namespace) -> None:
    """Megatron -> Hugging Face."""
    export_checkpoint(args.load, args.save, DTYPES.get(args.dtype), args.iteration)
    print(f"{args.load} -> {args.save}")


def do_inspect(args: argparse.Namespace) -> None:
    """Print what a checkpoint is."""
    for name, value in describe(args.load, args.iteration).items():
        print(f"{name:<12} {value}")


def do_verify(args: argparse.Namespace) -> int:
    """Compare both models; 1 if they differ."""
    # The only command that needs Megatron, whose import takes seconds.
    from megatron_infifpo.checks.conversion import verify

    return verify(args)


def parse_args() -> argparse.Namespace:
    """Parse the command line; `args.command` is the function of the subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="import | export | verify | inspect")
    dtype: dict[str, Any] = {"choices": list(DTYPES)}
    dtype["help"] = "of the weights written (default: the original's)"
    iteration: dict[str, Any] = {"type": whole(0), "metavar": "N"}
    iteration["help"] = "training iteration (default: the latest)"
    load: dict[str, Any] = {"required": True, "metavar": "DIR"}

    command = commands.add_parser("import", help="Hugging Face folder -> Megatron checkpoint")
    command.add_argument("--hf", **load, help="config.json, safetensors, tokenizer")
    command.add_argument("--save", **load, help="new folder; Megatron loads it with --load")
    command.add_argument("--dtype", **dtype)
    command.set_defaults(command=do_import)

    command = commands.add_parser("export", help="Megatron checkpoint -> Hugging Face folder")
    command.add_argument("--load", **load, help="imported or trained, at any parallel layout")
    command.add_argument("--save", **load, help="new folder")
    command.add_argument("--dtype", **dtype)
    command.add_argument("--iteration", **iteration)
    command.set_defaults(command=do_export)

    command = commands.add_parser("verify", help="compare log-probs of both; under torchrun")
    command.add_argument("--hf", **load, help="Hugging Face folder")
    command.add_argument("--load", **load, help="Megatron checkpoint, or a Hugging Face folder")
    command.add_argument("--tensor-model-parallel-size", type=positive, default=1, metavar="N")
    command.add_argument("--pipeline-model-parallel-size", type=positive, default=1, metavar="N")
    command.add_argument(
        "--by-layers",
        action="store_true",
        help="hold one layer of each model in memory at a time, on the CPU",
    )
    command.add_argument("--bf16", action="store_true", help="compute in bfloat16, not float32")
    command.add_argument(
        "--tolerance",
        type=real(0),
        metavar="X",
        help="largest difference of a token's log-prob (default: 1e-3, or 0.5 with --bf16)",
    )
    command.add_argument("--texts", metavar="FILE", help="one a line (default: built in)")
    command.set_defaults(command=do_verify)

    command = commands.add_parser("inspect", help="print what a checkpoint is")
    command.add_argument("--load", **load, help="Megatron checkpoint or Hugging Face folder")
    command.add_argument("--iteration", **iteration)
    command.set_defaults(command=do_inspect)
    return parser.parse_args()


def main() -> int | None:
    """Run the subcommand."""
    args = parse_args()
    result: int | None = args.command(args)
    return result


if __name__ == "__main__":
    run(main)
