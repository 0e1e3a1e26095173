"""Check everything that a training run reads: records, tokens, log-probs, soft targets, weights.

    infifpo check --data data/train --sources sources.yaml
    infifpo check --data data/train --sources sources.yaml --weights qwen=models/qwen
    infifpo check --data data/sft --soft-targets fusion/fusellm --sources fusion/sources.yaml

Records must have the fingerprint that the manifests name; their texts are tokenized again, for the
pivot and for every source; every stored log-prob is read, and what is stored with --top-k beside
it. --soft-targets reads all values of soft targets, and with --sources compares the log-probs that
they were fused from. --weights reads models' weights, too, and compares their fingerprints; --run
compares a training run's run.json. One line a check; the exit code is 2 if any failed.
"""

import argparse

from megatron_infifpo.commands.flags import add_data_flags, fields_of, read_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what is checked."""
    add_data_flags(parser)
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="the records, if they have moved"
    )
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=DIR",
        help="folders of models: `initial`, or a source's name",
    )  # fmt: skip
    parser.add_argument("--run", metavar="DIR", help="--save folder of a training run")


def run(args: argparse.Namespace) -> int:
    """Print one line a check; 2 if any failed."""
    from megatron_infifpo.checks.data import DataJob, check_data

    weights = read_folders("--weights", args.weights)
    failed = 0
    for check in check_data(DataJob(**fields_of(args, DataJob) | {"weights": weights})):
        failed += check.error is not None
        print(f"{'ok' if check.error is None else 'FAILED':<8}{check.what}: ", end="")
        print(check.error or check.note, flush=True)
    print(f"{failed} failed" if failed else "all is as it should be")
    return 2 if failed else 0
