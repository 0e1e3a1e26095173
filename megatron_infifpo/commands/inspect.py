"""Show one record as training sees it: tokens, every model's log-probs, the fused reference.

    infifpo inspect --data data/train --id train-17 --tokens
    infifpo inspect --data data/train --sources sources.yaml --id train-17
    infifpo inspect --data data/sft --soft-targets fusion/fusellm --sources fusion/sources.yaml \\
        --id sft-17

The method's flags are those of training. The reference is that of step 0, when the policy is the
initial pivot. With --soft-targets there is a line for each of the pivot's tokens: the source that
teaches it, the source's tokens there, its most probable ids as the pivot's. Of a list of responses,
what a method makes of it is shown where --method is given.
"""

import argparse

from megatron_infifpo.commands.flags import add_data_flags, fields_of
from megatron_infifpo.methods import add_method_flags, method_from_options, resolve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which record, and how it is used."""
    add_data_flags(parser)
    parser.add_argument("--id", required=True, help="of the record")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="if it is no longer where the dataset was made with it"
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="print what every model's template renders, with what is scored of it, and its tokens "
        "with their log-probs; without --sources those of the pivot",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the tokenizers"
    )
    add_method_flags(parser, usual="infifpo for pairs, none for lists")


def run(args: argparse.Namespace) -> None:
    """Print the record."""
    from megatron_infifpo.checks.inspection import InspectionJob, inspect_record

    # Options without a method are those of the usual one.
    method = method_from_options(args.method or "infifpo", vars(args))
    plain = args.method is None and method == resolve("infifpo")
    given = fields_of(args, InspectionJob) | {"method": None if plain else method}
    for line in inspect_record(InspectionJob(**given)):
        print(line)
