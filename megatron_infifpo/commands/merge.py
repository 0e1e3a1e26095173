"""Merge models that were trained from one base into one, tensor by tensor, without a GPU.

    infifpo merge --method sce --base phi-4-sft --models phi-4-qwen phi-4-mistral phi-4-coder \\
        --output phi-4-fused

They are Hugging Face folders, as infifpo export writes them. This is the second half of FuseChat:
a model is trained from the base with each source, and what they learned is merged. Methods:

    sce               select the elements that vary most, calculate weights, erase minority signs
    varm              weights by the models' mean squared changes
    linear            the weighted mean of the models
    task-arithmetic   the base, and --scale times the weighted sum of the models' changes

docs/merging.md has the formulas, and what FuseChat-7B was published with. One tensor of every model
is in memory at a time; it is computed in float32. Ranks of torchrun share the files.
"""

import argparse

from megatron_infifpo.commands.flags import fields_of
from megatron_infifpo.commands.import_ import DTYPES, add_dtype
from megatron_infifpo.convert.merge import merge
from megatron_infifpo.convert.merge_job import MergeJob
from megatron_infifpo.convert.merging import MERGES, all_options
from megatron_infifpo.flag_types import flag
from megatron_infifpo.options import described


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge."""
    parser.add_argument(
        "--method", required=True, choices=list(MERGES), help="how tensors are merged"
    )
    parser.add_argument(
        "--base",
        required=True,
        metavar="DIR",
        help="what all models were trained from; the configuration and the tokenizer are its",
    )
    parser.add_argument(
        "--models", required=True, nargs="+", metavar="DIR", help="to merge, in any order"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="new folder")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="of the models, in their order (linear: shares of the sum, default all equal; "
        "task-arithmetic: factors, default 1)",
    )
    for name, users in all_options().items():
        option = next(iter(users.values()))
        text = described(option.help, users)
        parser.add_argument(flag(name), default=None, help=text, **option.parsing())
    add_dtype(parser)


def run(args: argparse.Namespace) -> None:
    """Merge."""
    import torch

    dtype = getattr(torch, DTYPES[args.dtype]) if args.dtype else None
    job = MergeJob(**fields_of(args, MergeJob) | {"dtype": dtype})
    merge(job)
    print(f"{', '.join(args.models)} -> {args.output}")
