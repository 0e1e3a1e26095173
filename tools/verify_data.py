#!/usr/bin/env python
"""Check everything that a training run reads, end to end: records, tokens, log-probs, weights.

    python tools/verify_data.py --data data/train --sources sources.yaml
    python tools/verify_data.py --data data/train --sources sources.yaml --weights qwen=models/qwen

Records must have the fingerprint that the manifests name; their texts are tokenized again, for the
pivot and for every source; every stored log-prob is read. --weights reads models' weights, too, and
compares their fingerprints; --run compares a training run's run.json. One line a check; the exit
code is 1 if any failed.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_infifpo.checks.data import (
    Check,
    attempt,
    check_counts,
    check_logprobs,
    check_tokens,
    read_source_records,
)
from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.records.records import PreferenceRecord
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import SourcesConfig, check_domains, read_sources
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.dataset import TokenDataset

INITIAL = "initial"


def main() -> int:
    """Print one line a check; return 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="of the token dataset")
    parser.add_argument("--sources", metavar="FILE", help="sources.yaml; without it only tokens")
    parser.add_argument(
        "--input", nargs="+", default=[], metavar="FILE", help="the records, if they have moved"
    )
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="NAME=DIR",
        help="folders of models: `initial`, or a source's name",
    )  # fmt: skip
    parser.add_argument("--run", type=Path, metavar="DIR", help="--save folder of a training run")
    args = parser.parse_args()
    failed = 0
    for check in checks(args):
        failed += check.error is not None
        print(f"{'ok' if check.error is None else 'FAILED':<8}{check.what}: ", end="")
        print(check.error or check.note, flush=True)
    print(f"{failed} failed" if failed else "all is as it should be")
    return 1 if failed else 0


def checks(args: argparse.Namespace) -> Iterator[Check]:
    """Run them one by one; later ones need not succeed for the earlier."""
    tokens = TokenDataset(args.data)
    if args.weights and not args.sources:
        raise UserError("--weights has no effect without --sources")
    weights = dict(text.partition("=")[::2] for text in args.weights)
    records: list[PreferenceRecord] = []

    def read() -> str:
        records.extend(read_source_records(tokens, args.input))
        return f"{len(records)}, fingerprint {tokens.records_sha256[:12]}"

    yield attempt("records", read)
    if records:
        yield attempt(f"tokens in {args.data}", lambda: check_tokens(tokens, records))
    if args.sources:
        config = read_sources(args.sources)
        yield attempt(args.sources, lambda: domains(config, tokens))
        names = (INITIAL, *(source.name for source in config.sources))
        if unknown := weights.keys() - set(names):
            raise UserError(f"--weights {sorted(unknown)[0]}=: expected one of {', '.join(names)}")
        prefixes = {source.name: source.logprobs for source in config.sources}
        for name, prefix in {INITIAL: config.initial, **prefixes}.items():
            yield from model_checks(name, prefix, tokens, records, weights.get(name))
    if args.run:
        yield attempt(f"{args.run}/run.json", lambda: same_run(args))


def domains(config: SourcesConfig, tokens: TokenDataset) -> str:
    """Check the sources' domains."""
    check_domains(config, tokens.domains)
    return f"{len(config.sources)} sources, domains {', '.join(tokens.domains)}"


def model_checks(
    name: str, prefix: str, tokens: TokenDataset, records: list[PreferenceRecord], model: str | None
) -> Iterator[Check]:
    """Check one model's log-probs; its weights, too, where its folder is given."""
    try:
        store = LogprobStore(prefix)
    except UserError as error:
        yield Check(name, str(error))
        return
    initial = name == INITIAL
    yield attempt(f"{name}, log-probs", lambda: check_logprobs(store, tokens, initial=initial))
    if records:
        yield attempt(f"{name}, tokens", lambda: check_counts(store, records))
    if model is not None:
        yield attempt(f"{name}, weights", lambda: same_weights(store, model))


def same_weights(store: LogprobStore, model: str) -> str:
    """Compare the fingerprint of a model's weights."""
    from megatron_infifpo.convert.fingerprint import weights_fingerprint

    expected = store.manifest["weights_sha256"]
    if expected is None:
        return "imported: its weights are unknown"
    found = weights_fingerprint(model)
    if found != expected:
        raise UserError(
            f"{model} has weights of fingerprint {found[:12]}, but {store.prefix} was scored with "
            f"{expected[:12]}: score it again"
        )
    return f"{model}, fingerprint {found[:12]}"


def same_run(args: argparse.Namespace) -> str:
    """Compare the data with what a run says that it is made of."""
    from megatron_infifpo.training.provenance import data_identity, differences, read_run

    found = read_run(args.run)
    if found is None:
        raise UserError(f"{args.run} has no run.json: expected the --save folder of a training run")
    used = found["identity"]["data"]
    if "initial" in used and not args.sources:
        raise UserError("the run has sources: give --sources, too")
    config = read_sources(args.sources) if "initial" in used else None
    changes = differences(used, data_identity(PreferenceDataset(args.data, config)))
    if changes:
        raise UserError(f"it was made of other data: {'; '.join(changes)}")
    return f"{len(found['attempts'])} attempts on these data"


if __name__ == "__main__":
    run(main)
