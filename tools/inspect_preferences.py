#!/usr/bin/env python
"""Show one record as training sees it: tokens, every model's log-probs, the fused reference.

    python tools/inspect_preferences.py --data data/train --sources sources.yaml --id train-17

The method's flags are those of training. The reference is that of step 0, when the policy is the
initial pivot.
"""

import argparse
from typing import Any

import numpy as np

from megatron_infifpo.commands.entry import run
from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method, add_method_flags, method_from_args
from megatron_infifpo.records.records import iter_records
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset, PreferencePair
from megatron_infifpo.tokens.encoding import scored_marks
from megatron_infifpo.tokens.tokenization import ChatTokenizer
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
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="print every model's prompt, and its tokens of each response with their log-probs",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the tokenizers"
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
    tokenizer = ChatTokenizer.reopen(
        dataset.tokens.manifest["tokenizer"],
        args.tokenizer,
        trust_remote_code=args.trust_remote_code,
    )
    pair = dataset[index]
    print(f"record {args.id!r}, index {index}, domain {dataset.tokens.domain(index)}")
    if dataset.tokens.masked_records[index]:
        print(f"masked: {dataset.tokens.note(index)}; training leaves this pair out")
        return
    for remark in dataset.tokens.remarks(index):
        print(f"remark: {remark}")
    print_tokens(pair, dataset.tokens.responses[: method.responses], tokenizer)
    if dataset.initial is not None:
        print_models(dataset, pair)
        if args.tokens:
            print_scored_tokens(dataset, index, args.trust_remote_code)
        print_reference(dataset, pair, method)


def print_tokens(pair: PreferencePair, names: tuple[str, ...], tokenizer: ChatTokenizer) -> None:
    """Print prompt and responses decoded, and the ids around each border."""
    hf = tokenizer.tokenizer

    def ids(part: np.ndarray) -> str:
        return " ".join(f"{i}:{hf.decode([i])!r}" for i in part.tolist())

    print(f"\nprompt, {len(pair.prompt_ids)} tokens, not scored:")
    print(hf.decode(pair.prompt_ids.tolist()))
    marks = scored_marks(pair.response_ids, pair.scored)
    for name, response, mark in zip(names, pair.response_ids, marks, strict=True):
        print(f"\n{name}, {len(response)} tokens, {int(mark.sum())} of them scored:")
        print(hf.decode(response.tolist()))
        for number, part in enumerate(unscored_parts(response, mark), 1):
            print(f"  not scored, {number}: {hf.decode(part.tolist())!r}")
        print(f"  border: ... {ids(pair.prompt_ids[-EDGE:])}  |  {ids(response[:EDGE])} ...")
        print(f"  end:    ... {ids(response[-EDGE:])}")


def unscored_parts(ids: np.ndarray, mark: np.ndarray) -> list[np.ndarray]:
    """Return the runs of tokens that are not scored."""
    borders = np.flatnonzero(np.diff(mark)) + 1
    parts = zip(np.split(ids, borders), np.split(mark, borders), strict=True)
    return [part for part, scored in parts if not scored.all()]


def models(dataset: PreferenceDataset) -> list[tuple[str, LogprobStore]]:
    """Name and log-probs of the initial pivot and of every source."""
    assert dataset.initial is not None
    sources = zip(dataset.source_names, dataset.sources, strict=True)
    return [("initial pivot", dataset.initial), *sources]


def print_models(dataset: PreferenceDataset, pair: PreferencePair) -> None:
    """Print how each model was scored, then its sum, tokens and mean for each response."""
    print("\nhow they were scored")
    for name, store in models(dataset):
        print(f"{name:<24}{origin(store.manifest)}")
    print("\nlog-probs")
    print(f"{'model':<24}{'response':<14}{'sum':>12}{'tokens':>8}{'mean':>10}")
    for column, (name, store) in enumerate(models(dataset), start=-1):
        note = store.note(pair.index)
        if store.masked(pair.index):
            print(f"{name:<24}masked: {note}")
            continue
        assert pair.source_mask is not None
        if column >= 0 and not pair.source_mask[column]:
            note = "masked: its domains do not include this record's"
        sums, counts = store.sums(pair.index), store.counts(pair.index)
        for response, total, count in zip(store.responses, sums, counts, strict=True):
            line = f"{name:<24}{response:<14}{total:>12.4f}{count:>8}{total / count:>10.4f}"
            print(f"{line}  {note}" if note else line)


def origin(manifest: dict[str, Any]) -> str:
    """Say in a line where log-probs come from and what its model was shown."""
    chat = manifest["tokenizer"]
    made = f"{manifest['model']}, {manifest['backend']}, {manifest['dtype']}"
    if chat["path"] is None:
        return f"{made}; tokenizer and chat template unknown"
    template = "chat template given by hand; " if chat["chat_template"] else ""
    return (
        f"{made}; tokenizer {chat['path']}; {template}system message {chat['system_message']}; "
        f"a turn ends with {chat['end_of_turn']!r}"
    )


def print_scored_tokens(dataset: PreferenceDataset, index: int, trust_remote_code: bool) -> None:
    """Print each model's prompt and response tokens: `[not scored]`, or with the log-prob."""
    files, record_id = dataset.tokens.manifest["source_files"], dataset.tokens.ids(index)
    records = iter_records(files, on_bad="skip")
    record = next((r for r in records if r.id == record_id), None)
    if record is None:
        raise UserError(f"--tokens needs the record's text, but {record_id!r} is not in {files}")
    for name, store in models(dataset):
        print(f"\n{name}: what it was shown, and the log-probs of its tokens")
        known = store.has_values and store.manifest["tokenizer"]["path"] is not None
        if store.masked(index) or not known:
            print(f"  none: {store.note(index) or 'imported without tokens or without values'}")
            continue
        try:
            chat = ChatTokenizer.reopen(
                store.manifest["tokenizer"], trust_remote_code=trust_remote_code
            )
        except UserError as error:
            print(f"  not shown: {error}")
            continue
        rendered, tokens, decode = chat.render(record), chat.encode(record), chat.tokenizer.decode
        print(f"the template renders: {rendered.prompt}")
        if (shown := decode(tokens.prompt_ids.tolist())) != rendered.prompt:
            print(f"its tokens read: {shown}")
        marks = scored_marks(tokens.response_ids, tokens.scored)
        for r, (response, mark) in enumerate(zip(store.responses, marks, strict=True)):
            values = iter(store.logprobs(index, r).tolist())
            shown = []
            for token, scored in zip(tokens.response_ids[r].tolist(), mark.tolist(), strict=True):
                value = next(values, None) if scored else None
                if scored and value is None:
                    break  # it was cut
                shown.append(
                    f"[{decode([token])!r}]"
                    if value is None
                    else f"{decode([token])!r} {value:.3f}"
                )
            print(f"{response}, rendered: {rendered.replies[r].text}")
            print(f"{response}, tokens: " + " ".join(shown))


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
