"""Tokenize preference records with the pivot's tokenizer, into a token dataset.

    infifpo prepare --input train.jsonl more.parquet --tokenizer phi-4 --output data/train

Nothing is truncated or left out: pairs too long for a training run are left out by that run. With
--on-bad-record skip, a record that the chat template refuses keeps its place, without tokens.
"""

import argparse
import collections
from typing import TYPE_CHECKING

from megatron_infifpo.commands.flags import (
    add_record_flags,
    add_tokenizer_flags,
    fields_of,
    tokenizer_options,
)

if TYPE_CHECKING:
    from megatron_infifpo.tokens.dataset import TokenDataset
    from megatron_infifpo.tokens.prepare import PreparationJob

PERCENTILES = (0, 50, 90, 99, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a preparation."""
    add_record_flags(parser)
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="the pivot's tokenizer, with a template"
    )
    parser.add_argument("--output", required=True, metavar="PREFIX", help="of the files to write")
    add_tokenizer_flags(parser)


def job_of(args: argparse.Namespace) -> "PreparationJob":
    """Return what is tokenized."""
    from megatron_infifpo.tokens.prepare import PreparationJob

    given = fields_of(args, PreparationJob)
    return PreparationJob(**given, tokenizer_options=tokenizer_options(args))


def run(args: argparse.Namespace) -> None:
    """Write the dataset, print a summary."""
    from megatron_infifpo.tokens.prepare import prepare

    print_summary(prepare(job_of(args)))


def print_summary(tokens: "TokenDataset") -> None:
    """Print counts, masked records, domains and percentiles of lengths."""
    import numpy as np

    from megatron_infifpo.references.summary import list_sizes
    from megatron_infifpo.tokens.lengths import domain_lengths

    kept = ~tokens.masked_records
    responses = tokens.response_lengths[kept]
    lengths = {"prompt": tokens.prompt_lengths[kept]}
    if tokens.listed:
        lengths["response"] = responses[responses > 0]
    else:
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
    if tokens.listed:
        print(list_sizes(responses))
    if tokens.scores is not None:
        there = responses > 0
        known = int(np.isfinite(tokens.scores[kept])[there].sum())
        print(f"scores: {known} of {int(there.sum())} responses")
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
    if len(domains := domain_lengths(tokens)) > 1:
        heads = ("records", "median", "95 %", "longest")
        print(f"{'prompt + longest':<18}" + "".join(f"{head:>8}" for head in heads))
        for domain, *numbers in domains:
            print(f"{domain:<18}" + "".join(f"{number:>8}" for number in numbers))
