"""Compare a Megatron checkpoint with its Hugging Face model: log-probs of the same texts.

    torchrun --nproc-per-node 2 -m megatron_infifpo verify --hf phi-4 --load ckpt/phi-4 \\
        --tensor-model-parallel-size 2 --bf16

It prints the token whose log-probs differ most, and the weights that do; the exit code is 2 where a
log-prob differs by more than the tolerance: asking again changes nothing.
"""

import argparse

from megatron_infifpo.commands.flags import add_expert_flags, fields_of
from megatron_infifpo.flag_types import positive, real


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a verification."""
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument(
        "--load", required=True, metavar="DIR", help="Megatron checkpoint, or a Hugging Face folder"
    )
    parser.add_argument("--tensor-model-parallel-size", type=positive, default=1, metavar="N")
    parser.add_argument("--pipeline-model-parallel-size", type=positive, default=1, metavar="N")
    add_expert_flags(parser)
    parser.set_defaults(expert_model_parallel_size=1, expert_tensor_parallel_size=1)
    parser.add_argument(
        "--by-layers",
        action="store_true",
        help="hold one layer of each model in memory at a time, on the CPU",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, not float32")
    parser.add_argument(
        "--tolerance",
        type=real(0),
        metavar="X",
        help="largest difference of a token's log-prob (default: 1e-3, or 0.5 with --bf16; with "
        "experts and --bf16 a mean one of 0.3)",
    )
    parser.add_argument("--texts", metavar="FILE", help="one a line (default: built in)")


def run(args: argparse.Namespace) -> int:
    """Compare both models; 2 if they differ."""
    from megatron_infifpo.checks.conversion import VerificationJob, verify

    found = verify(VerificationJob(**fields_of(args, VerificationJob)))
    for sentence in found.sentences():
        print(sentence)
    return 0 if found.passed else 2
