"""Turn log-probs that others have computed into log-prob datasets.

The published dataset of the InfiFPO paper (ref_*_logps, fuse_*_logps in every record), all models
at once, with a sources.yaml:

    infifpo import-logprobs published --input paper.json --names qwen mistral gemma \\
        --output logprobs

A log-prob for every token of one model, such as vLLM's prompt_logprobs (docs/scoring.md):

    infifpo import-logprobs tokens --input train.jsonl --logprobs qwen.jsonl \\
        --tokenizer qwen2.5-14b-instruct --name qwen --output logprobs/qwen
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.flags import (
    add_record_flags,
    add_tokenizer_flags,
    tokenizer_options,
)
from megatron_infifpo.errors import UserError
from megatron_infifpo.tokens.options import TokenizerOptions, open_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the two forms and their flags."""
    commands = parser.add_subparsers(dest="form", required=True)

    command = commands.add_parser("published", help="the dataset format of the InfiFPO paper")
    add_record_flags(command, lists=False)
    command.add_argument(
        "--names",
        nargs="+",
        default=[],
        metavar="NAME",
        help="of the sources (default: source1 ...)",
    )
    command.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder for all datasets"
    )

    command = commands.add_parser("tokens", help="JSONL with a log-prob for every token")
    add_record_flags(command)
    command.add_argument(
        "--logprobs", required=True, nargs="+", metavar="FILE", help="JSONL, records in any order"
    )
    command.add_argument("--name", required=True, help="of the model, for the manifest")
    command.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="the model's; checks that its tokens were scored (needed for prompt_logprobs)",
    )
    command.add_argument(
        "--mask-missing", action="store_true", help="mask records that have no log-probs"
    )
    command.add_argument("--output", required=True, metavar="PREFIX", help="of the dataset")
    add_tokenizer_flags(command)


def run(args: argparse.Namespace) -> None:
    """Import."""
    if args.form == "published":
        from megatron_infifpo.references.published import import_published

        import_published(args.input, args.names, args.output, on_bad=args.on_bad_record)
        return
    options = tokenizer_options(args)
    if args.tokenizer is None and options != TokenizerOptions():
        raise UserError(
            "--chat-template, --chat-template-options, --trust-remote-code, --score and "
            "--score-reasoning have no effect without --tokenizer: give it, or leave them out"
        )
    from megatron_infifpo.references.imported import import_tokens

    import_tokens(
        args.input,
        args.logprobs,
        args.output,
        name=args.name,
        tokenizer=open_tokenizer(args.tokenizer, options) if args.tokenizer else None,
        on_bad=args.on_bad_record,
        lists=args.lists,
        mask_missing=args.mask_missing,
    )
