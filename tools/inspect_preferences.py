#!/usr/bin/env python
"""Show one record as training sees it: tokens, every model's log-probs, the fused reference.

    python tools/inspect_preferences.py --data data/train --sources sources.yaml --id train-17

The method's flags are those of training. The reference is that of step 0, when the policy is the
initial pivot.
"""

import argparse

import numpy as np

from megatron_infifpo.cli import UserError, run
from megatron_infifpo.data.batching import collate
from megatron_infifpo.data.preference_dataset import PreferenceDataset, PreferencePair
from megatron_infifpo.data.sources import read_sources
from megatron_infifpo.data.tokenization import ChatTokenizer
from megatron_infifpo.methods import Method, add_method_flags, method_from_args
from megatron_infifpo.training.objective import pair_losses, response_logps

EDGE = 6  # tokens shown on each side of a border


def main() -> None:
    """Parse the command line and print the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="PREFIX", help="of the token dataset")
    parser.add_argument("--id", required=True, help="of the record")
    parser.add_argument("--sources", metavar="FILE", help="sources.yaml; without it only tokens")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="if it is no longer where the dataset was made with it"
    )
    add_method_flags(parser)
    args = parser.parse_args()
    method = method_from_args(args)
    config = read_sources(args.sources) if args.sources else None
    fused = config is not None and method.fused
    dataset = PreferenceDataset(
        args.data, config, require_sources=fused, responses=method.responses
    )
    index = dataset.tokens.find(args.id)
    if index is None:
        raise UserError(
            f"{args.data} has no record {args.id!r}, expected an id such as "
            f"{dataset.tokens.ids(0)!r}"
        )
    tokenizer = open_tokenizer(dataset, args.tokenizer)
    pair = dataset[index]
    print(f"record {args.id!r}, index {index}, domain {dataset.tokens.domain(index)}")
    print_tokens(pair, dataset.tokens.responses[: method.responses], tokenizer)
    if dataset.initial is not None:
        print_models(dataset, pair)
        print_reference(dataset, pair, method)


def open_tokenizer(dataset: PreferenceDataset, path: str | None) -> ChatTokenizer:
    """Load the dataset's tokenizer and make sure that it is the same one."""
    made_with = dataset.tokens.manifest["tokenizer"]
    tokenizer = ChatTokenizer.from_pretrained(path or made_with["path"])
    for name, found in tokenizer.fingerprint().items():
        if found != made_with[name]:
            raise UserError(
                f"the tokenizer {tokenizer.path} has {name} {found[:12]}, expected "
                f"{made_with[name][:12]} of {dataset.tokens.prefix}; give the right one to "
                "--tokenizer"
            )
    return tokenizer


def print_tokens(pair: PreferencePair, names: tuple[str, ...], tokenizer: ChatTokenizer) -> None:
    """Print prompt and responses decoded, and the ids around each border."""
    hf = tokenizer.tokenizer

    def ids(part: np.ndarray) -> str:
        return " ".join(f"{i}:{hf.decode([i])!r}" for i in part.tolist())

    print(f"\nprompt, {len(pair.prompt_ids)} tokens, not scored:")
    print(hf.decode(pair.prompt_ids.tolist()))
    for name, response in zip(names, pair.response_ids, strict=True):
        print(f"\n{name}, {len(response)} tokens, end of turn included:")
        print(hf.decode(response.tolist()))
        print(f"  border: ... {ids(pair.prompt_ids[-EDGE:])}  |  {ids(response[:EDGE])} ...")
        print(f"  end:    ... {ids(response[-EDGE:])}")


def print_models(dataset: PreferenceDataset, pair: PreferencePair) -> None:
    """Print sum, tokens and mean of each model for each response."""
    assert dataset.initial is not None
    print("\nlog-probs")
    print(f"{'model':<24}{'response':<14}{'sum':>12}{'tokens':>8}{'mean':>10}")
    sources = zip(dataset.source_names, dataset.sources, strict=True)
    stores = [("initial pivot", dataset.initial), *sources]
    for column, (name, store) in enumerate(stores, start=-1):
        if store.masked(pair.index):
            print(f"{name:<24}masked: {store.reason(pair.index)}")
            continue
        assert pair.source_mask is not None
        outside = column >= 0 and not pair.source_mask[column]
        sums, counts = store.sums(pair.index), store.counts(pair.index)
        for response, total, count in zip(store.responses, sums, counts, strict=True):
            note = "  masked: its domains do not include this record's" if outside else ""
            print(f"{name:<24}{response:<14}{total:>12.4f}{count:>8}{total / count:>10.4f}{note}")


def print_reference(dataset: PreferenceDataset, pair: PreferencePair, method: Method) -> None:
    """Print each source's clipped value and share, the reference, and the first loss."""
    assert dataset.initial is not None
    if dataset.initial.masked(pair.index):
        print("\nno reference: the initial pivot has no log-probs; training leaves this pair out")
        return
    if method.reference is None:
        print("\nno reference: SFT")
        return
    row = collate([pair])
    losses, initial, fused = pair_losses(method, row, row["initial_sum_logps"], progress=0.0)
    compared = "means" if method.length_normalization else "sums"
    print(f"\nreference at step 0: {method.reference}, {compared}, {method.objective}'s loss")
    print(f"{'response':<14}{'source':<24}{'value':>12}{'clipped to':>12}{'share':>8}")
    sources = response_logps(method, row["source_sum_logps"], row["source_token_counts"])
    names = dataset.source_names if method.fused else ()
    for r, response in enumerate(dataset.tokens.responses[: method.responses]):
        own = initial[0, r].item()
        for m, name in enumerate(names):
            if not row["source_mask"][0, m]:
                print(f"{response:<14}{name:<24}{'masked':>12}")
                continue
            changed = fused.clipped is not None and bool(fused.clipped[0, r, m])
            clipped = f"{own:.4f}" if changed else "-"
            share = fused.weights[0, r, m].item()
            print(f"{response:<14}{name:<24}{sources[0, r, m]:>12.4f}{clipped:>12}{share:>8.3f}")
        if method.initial_as_source:
            share = fused.weights[0, r, -1].item()
            print(f"{response:<14}{'initial pivot':<24}{own:>12.4f}{'-':>12}{share:>8.3f}")
        print(f"{response:<14}{'reference':<24}= {fused.logps[0, r]:.4f} (initial pivot {own:.4f})")
    print(f"loss {losses.item():.4f}")


if __name__ == "__main__":
    run(main)
