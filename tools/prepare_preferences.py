#!/usr/bin/env python
"""Tokenize preference records with the pivot's tokenizer, into a token dataset.

    python tools/prepare_preferences.py --input train.jsonl more.parquet \\
        --tokenizer phi-4 --output data/train

Nothing is truncated or left out: pairs too long for a training run are left out by that run. With
--on-bad-record skip, a record that the chat template refuses keeps its place, without tokens.
"""

import argparse
import collections

import numpy as np
from tqdm import tqdm

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.read_report import ReadReport
from megatron_infifpo.records.records import iter_records
from megatron_infifpo.tokens.dataset import TokenDataset
from megatron_infifpo.tokens.flags import add_record_flags, add_tokenizer_flags, open_tokenizer
from megatron_infifpo.tokens.writer import write_token_dataset

PERCENTILES = (0, 50, 90, 99, 100)


def main() -> None:
    """Parse the command line, write the dataset, print a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_record_flags(parser)
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the pivot's tokenizer, with a template"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the files to write")
    add_tokenizer_flags(parser)
    args = parser.parse_args()
    tokenizer = open_tokenizer(args.tokenizer, args)
    report = ReadReport()
    records = iter_records(args.input, on_bad=args.on_bad_record, report=report)
    try:
        write_token_dataset(
            tqdm(records, desc="tokenize", unit=" records"),
            tokenizer,
            args.output,
            source_files=args.input,
            on_refused="mask" if args.on_bad_record == "skip" else "error",
        )
    except UserError:
        report.show()  # it may be why nothing is left
        raise
    report.show()
    print_summary(TokenDataset(args.output))


def print_summary(tokens: TokenDataset) -> None:
    """Print counts, masked records, domains and percentiles of lengths."""
    kept = ~tokens.masked_records
    responses = tokens.response_lengths[kept]
    lengths = {"prompt": tokens.prompt_lengths[kept]}
    lengths |= {name: responses[:, column] for column, name in enumerate(tokens.responses)}
    lengths["prompt + longest"] = lengths["prompt"] + responses.max(axis=1)
    prompts, replied, scored = (
        int(part.sum(dtype=np.int64))
        for part in (lengths["prompt"], responses, tokens.scored_lengths)
    )
    unscored = f", {replied - scored} of them not scored" if scored < replied else ""
    print(
        f"{tokens.prefix}: {len(tokens)} records, {prompts + replied} tokens, {replied} of "
        f"responses{unscored}"
    )
    for reason, count in tokens.manifest["note_counts"].items():
        print(f"masked, in their place but without tokens: {count} records: {reason}")
    for remark, count in tokens.manifest["remark_counts"].items():
        print(f"remark on {count} records: {remark}")
    counts = collections.Counter(tokens.domain_codes.tolist())
    print("domains: " + ", ".join(f"{tokens.domains[c]} {n}" for c, n in sorted(counts.items())))
    print(f"{'tokens':<18}" + "".join(f"{f'p{p}':>8}" for p in PERCENTILES))
    for name, values in lengths.items():
        row = np.percentile(values, PERCENTILES, method="higher")
        print(f"{name:<18}" + "".join(f"{int(value):>8}" for value in row))


if __name__ == "__main__":
    run(main)
