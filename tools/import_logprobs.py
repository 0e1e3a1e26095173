#!/usr/bin/env python
"""Turn log-probs that others have computed into log-prob datasets.

The published dataset of the InfiFPO paper (ref_*_logps, fuse_*_logps in every record), all models
at once, with a sources.yaml:

    python tools/import_logprobs.py published --input paper.json --names qwen mistral gemma \\
        --output logprobs

A log-prob for every token of one model, such as vLLM's prompt_logprobs (docs/scoring.md):

    python tools/import_logprobs.py tokens --input train.jsonl --logprobs qwen.jsonl \\
        --tokenizer qwen2.5-14b-instruct --name qwen --output logprobs/qwen
"""

import argparse
from pathlib import Path

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.references.imported import import_tokens
from megatron_infifpo.references.published import import_published
from megatron_infifpo.tokens.flags import add_record_flags, add_tokenizer_flags, open_tokenizer


def main() -> None:
    """Parse the command line and import."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("published", help="the dataset format of the InfiFPO paper")
    add_record_flags(command)
    command.add_argument(
        "--names", nargs="+", default=[], metavar="NAME", help="of the sources (default: source1 …)"
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

    args = parser.parse_args()
    if args.command == "published":
        import_published(args.input, args.names, args.output, on_bad=args.on_bad_record)
        return
    if args.tokenizer is None and (args.chat_template or args.trust_remote_code):
        raise UserError(
            "--chat-template and --trust-remote-code have no effect without --tokenizer"
        )
    import_tokens(
        args.input,
        args.logprobs,
        args.output,
        name=args.name,
        tokenizer=open_tokenizer(args.tokenizer, args) if args.tokenizer else None,
        on_bad=args.on_bad_record,
        mask_missing=args.mask_missing,
    )


if __name__ == "__main__":
    run(main)
