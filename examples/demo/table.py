"""What came out: what fusing gains on held-out pairs, and what it does to training pairs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from island import truth
from torch import Tensor

from megatron_infifpo.methods import resolve
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.study.why import explain

PULLS: dict[str, dict[str, Any]] = {
    "DPO": {"reference": "initial"},
    "InfiFPO": {},
    "InfiFPO without clipping": {"clip": False},
    "DPO weighted by the sources": {"reference": "initial", "pair_weights": "agreement"},
}


def mean_logps(store: LogprobStore, records: Iterable[int] | None = None) -> Tensor:
    """`[N, R]` mean log-probs of the responses of all records, or of these."""
    indices = range(len(store)) if records is None else records
    rows = [store.sums(i) / store.counts(i) for i in indices]
    return torch.from_numpy(np.stack(rows))


def print_differences(run: Path, name: str, others: dict[str, str]) -> None:
    """Print what one model's held-out accuracy is above others', with 95 % intervals.

    `others` are labels and names as scored. Pairs of one fact are no independent evidence: facts
    are drawn again, not pairs (a paired bootstrap of 10,000).
    """
    fact_of = np.array([fact for fact, _ in truth(run / "inputs" / "heldout.jsonl")])
    right = {}
    for other in (name, *others.values()):
        mean = mean_logps(LogprobStore(run / "logprobs" / "heldout" / other))
        right[other] = (mean[:, 0] > mean[:, 1]).double().numpy()
    facts = np.unique(fact_of)
    drawn = np.random.default_rng(1234).integers(len(facts), size=(10_000, len(facts)))
    print(f"\nInfiFPO's accuracy, points above (95 % over {len(facts)} facts, one seed)")
    for label, other in others.items():
        gain = 100 * (right[name] - right[other])
        of_fact = np.array([gain[fact_of == fact].mean() for fact in facts])
        low, high = np.quantile(of_fact[drawn].mean(axis=1), [0.025, 0.975])
        print(f"  {label:<10}{of_fact.mean():>+7.1f}  ({low:+.1f} to {high:+.1f})")


def print_pull(run: Path) -> None:
    """Print how hard the first step pulls at pairs whose label is right, or wrong.

    The pull is that of `study.why`: 1/2 for a pair whose reference is the policy itself.
    """
    labels = [1 if right else -1 for _, right in truth(run / "data" / "preference.jsonl")]
    data, wrong = (run / "data" / "preference", run / "sources" / "fused.yaml"), labels.count(-1)
    print(f"\npull of the first step on {len(labels) - wrong} pairs whose label is right, and on")
    print(f"{wrong} whose label is wrong; and how well it tells them apart (AUC, 0.5 by chance)")
    for label, options in PULLS.items():
        method = resolve("infifpo", **options)
        found = explain(method, data, np.array(labels))
        pull = f"{found['coefficient_right']:>8.2f}{found['coefficient_wrong']:>8.2f}"
        print(f"  {label:<28}{pull}{found['auc']:>8.2f}")
