"""Train a pivot by preference optimization or SFT, through Megatron's own training loop.

Two ranks, for example:

    torchrun --nproc-per-node 2 -m megatron_infifpo train --method infifpo \\
        --preference-data data/train --preference-sources data/sources.yaml \\
        --pretrained-checkpoint pivot --save run --pipeline-model-parallel-size 2 \\
        --micro-batch-size 2 --global-batch-size 128 --lr 1e-7 --bf16

or with the same flags, by name, in a file: `infifpo train --config run.yaml`.

Megatron's flags work as in Megatron; what cannot work with packed preference pairs is refused. The
architecture comes from the pivot: a checkpoint, or a Hugging Face folder. `--load` defaults to
`--save`, so the same command starts a run and resumes it.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_infifpo.training.config_file import with_file

if TYPE_CHECKING:
    from megatron_infifpo.training.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run, and Megatron's."""
    from megatron_infifpo.training.config import add_run_flags

    parser.usage = "%(prog)s --preference-data PREFIX [flags of a run] [Megatron's flags]"
    add_run_flags(parser)


def parse(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the words after those of the file that they name."""
    return parser.parse_args(with_file(parser, words))


def job_of(args: argparse.Namespace) -> "RunConfig":
    """Return what the run is."""
    from megatron_infifpo.training.config import RunConfig

    return RunConfig.from_options(vars(args))


def run(args: argparse.Namespace) -> None:
    """Train."""
    from megatron_infifpo.training.run import train

    train(job_of(args))
