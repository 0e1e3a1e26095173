"""The closing table of a scoring job."""

from collections.abc import Sequence

import numpy as np

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.storage.notes import noted
from megatron_infifpo.tokens.lengths import by_domain


def print_summary(
    store: LogprobStore, domains: Sequence[str], covered: np.ndarray | None = None
) -> None:
    """Print what was scored: records, masked ones, response tokens, mean log-prob.

    Of pairs it says which response the model prefers, of lists how many responses there are; and,
    where there are most probable tokens, how much of the probability they have.

    Args:
        store: the finished dataset of N records.
        domains: `[N]`, of the records.
        covered: float64 `[N, 2]`, `top_k.covered_mass` of each record.
    """
    if store.top_k is None:
        covered = None
    print(f"\n{store.manifest['model']} -> {store.prefix}")
    print(
        f"{'domain':<12}{'records':>9}{'masked':>8}{'tokens':>12}"
        f"{'mean log-prob':>15}{'responses' if store.listed else 'prefers chosen':>16}"
        + ("" if covered is None else f"{f'mass in top {store.top_k}':>18}")
    )
    names, codes = np.unique(np.array(domains), return_inverse=True)
    for code, name in enumerate(names):
        print(_line(name, store, codes == code, covered))
    print(_line("all", store, codes >= 0, covered))
    if store.listed and not store.masked_records.all():
        print(list_sizes(store.token_counts[~store.masked_records]))
    for kind in ("note", "remark"):
        for text, count in store.manifest[f"{kind}_counts"].items():
            ranges = {text: store.manifest[f"{kind}s"][text]}
            about = noted(ranges, len(store), f"{store.prefix}.json")
            print(f"{kind} on {count} records: {text} ({by_domain(names.tolist(), codes, about)})")


def list_sizes(lengths: np.ndarray) -> str:
    """Say how many lists of which sizes there are: lengths `[N, R]`, 0 of what a list lacks."""
    sizes = np.unique((lengths > 0).sum(axis=1), return_counts=True)
    found = zip(*sizes, strict=True)
    return "lists: " + ", ".join(f"{count} of {size} responses" for size, count in found)


def _line(title: str, store: LogprobStore, inside: np.ndarray, covered: np.ndarray | None) -> str:
    scored = inside & ~store.masked_records
    sums, counts = store.all_sums[scored], store.token_counts[scored]
    total, tokens, kept = float(sums.sum()), int(counts.sum(dtype=np.int64)), int(scored.sum())
    mean = f"{total / tokens:.3f}" if kept else "-"
    masked = int(inside.sum()) - kept
    if store.listed:
        last = str((counts > 0).sum())
    else:
        means = sums / counts
        last = f"{(means[:, 0] > means[:, 1]).mean():.1%}" if kept else "-"
    line = f"{title:<12}{inside.sum():>9}{masked:>8}{tokens:>12}{mean:>15}{last:>16}"
    if covered is None:
        return line
    mass, count = covered[inside].sum(axis=0)
    return line + f"{f'{mass / count:.1%}' if count else '-':>18}"
