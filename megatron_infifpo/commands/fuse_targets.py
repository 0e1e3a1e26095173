"""Fuse the sources' distributions over tokens into one soft target for every token of the pivot.

Every model of sources.yaml that takes part was scored with --top-k. Tokens are aligned by bytes and
ids mapped by bytes, whatever the vocabularies. The table at the end says, by domain, what each
source can teach.

    infifpo fuse-targets --data data/train --sources sources.yaml --output targets/train

    infifpo fuse-targets --data data/train --sources sources.yaml --output targets/qwen \\
        --only qwen --include-initial
"""

import argparse

from megatron_infifpo.commands.flags import fields_of, read_folders, take_defaults
from megatron_infifpo.flag_types import positive
from megatron_infifpo.fusing.fuse import FUSIONS
from megatron_infifpo.fusing.job import CE_PER, FusingJob, fuse_targets
from megatron_infifpo.fusing.vocabulary import AMBIGUOUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a fusing job."""
    parser.add_argument(
        "--data", required=True, metavar="PREFIX", help="of the pivot's token dataset"
    )
    parser.add_argument("--sources", required=True, metavar="FILE", help="sources.yaml")
    parser.add_argument(
        "--output", required=True, metavar="PREFIX", help="of the soft-target dataset to write"
    )
    parser.add_argument(
        "--fusion",
        choices=list(FUSIONS),
        help="mince: the source that predicts the response best; average-ce: all, by a softmax "
        "over exp(-CE); mean: all, by the weights of sources.yaml; none: keep each source's values "
        "side by side, for infifusion (default: %(default)s)",
    )
    parser.add_argument(
        "--include-initial",
        action="store_true",
        help="the initial pivot is a source, too (it was scored with --top-k)",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="of the sources that take part (default: all)"
    )
    parser.add_argument(
        "--ce-per",
        choices=CE_PER,
        help="compare cross-entropies by byte, or by each source's own tokens, as published, which "
        "favours sources that cut texts finer (default: %(default)s)",
    )
    parser.add_argument(
        "--ambiguous",
        choices=AMBIGUOUS,
        help="ids of a source that stand for several of the pivot's, as digits do where the source "
        "splits numbers: digits: those of numbers into the tail; tail: all into the tail; group: "
        "keep them, as groups; id: take them for their twins, as published, which is biased "
        "(default: digits)",
    )
    parser.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help="ids of a token that are kept, the others' mass goes into its tail (default: as many "
        "as every source has)",
    )
    where = parser.add_argument_group("where tokenizers are now, if they have moved")
    where.add_argument("--tokenizer", metavar="DIR", help="the pivot's")
    where.add_argument(
        "--source-tokenizer", nargs="+", metavar="NAME=DIR", default=[], help="of sources"
    )
    where.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the tokenizers"
    )
    folders = parser.get_default("source_tokenizer")
    take_defaults(parser, FusingJob)
    parser.set_defaults(source_tokenizer=folders)


def run(args: argparse.Namespace) -> None:
    """Fuse."""
    folders = read_folders("--source-tokenizer", args.source_tokenizer)
    fuse_targets(FusingJob(**fields_of(args, FusingJob) | {"source_tokenizer": folders}))
