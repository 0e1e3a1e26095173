"""What came out: held-out pairs under several models, and what fusion does to training pairs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from island import truth
from job import Job
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.study.why import explain

# float32 on both sides: what is left is the order of additions.
EXPORT_TOLERANCE = 1e-4

PULLS: dict[str, dict[str, Any]] = {
    "DPO": {"reference": "initial"},
    "InfiFPO": {},
    "InfiFPO without clipping": {"clip": False},
    "DPO weighted by the sources": {"reference": "initial", "pair_weights": "agreement"},
}


def check_export(logprobs: Path) -> None:
    """The exported model under transformers must give Megatron's log-probs of every token."""
    exported = LogprobStore(logprobs / "heldout-fused-hf")
    trained = LogprobStore(logprobs / "heldout-fused")
    worst = max(
        float(np.abs(exported.logprobs(i, r) - trained.logprobs(i, r)).max())
        for i in range(len(trained))
        for r in range(2)
    )
    print(f"export check: largest per-token log-prob difference {worst:.1e}")
    if worst > EXPORT_TOLERANCE:
        raise UserError(f"the exported model differs from the trained one by {worst:.1e} a token")


def mean_logps(store: LogprobStore, records: Iterable[int] | None = None) -> Tensor:
    """`[N, R]` mean log-probs of the responses of all records, or of these."""
    indices = range(len(store)) if records is None else records
    rows = [store.sums(i) / store.counts(i) for i in indices]
    return torch.from_numpy(np.stack(rows))


def accuracy_and_margin(mean: Tensor) -> tuple[float, float]:
    """How often and by how much the chosen response has the higher mean log-prob."""
    gap = mean[:, 0] - mean[:, 1]
    return (gap > 0).double().mean().item(), gap.mean().item()


def print_rows(folder: Path, split: str, names: dict[str, str]) -> None:
    """Print accuracy and margin on a split under several models.

    `names` are labels of the rows, and the names that the models were scored by. Records that one
    of them is masked for (a text exceeds its context) are left out for all.
    """
    tokens = PreferenceDataset(folder / "data" / split).tokens
    stores = {
        label: LogprobStore(folder / "logprobs" / f"{split}-{name}")
        for label, name in names.items()
    }
    kept = np.flatnonzero(~np.any([store.masked_records for store in stores.values()], axis=0))
    if left_out := len(tokens) - len(kept):
        print(f"{left_out} of {len(tokens)} records exceed a model's context and are left out")
    domains = np.array([tokens.domains[code] for code in tokens.domain_codes[kept]])
    columns = [*sorted(set(domains)), "all"]
    width = max(map(len, names)) + 2
    heads = "".join(f"{domain:>10}" for domain in columns)
    print(f"{'accuracy':<{width}}{heads}{'margin':>10}{'chosen':>10}{'rejected':>10}")
    for label, store in stores.items():
        mean = mean_logps(store, kept)
        cells = []
        for domain in columns:
            inside = torch.from_numpy((domains == domain) | (domain == "all"))
            accuracy, margin = accuracy_and_margin(mean[inside])
            cells.append(f"{accuracy:>10.1%}")
        chosen, rejected = mean[:, 0].mean().item(), mean[:, 1].mean().item()
        print(f"{label:<{width}}{''.join(cells)}{margin:>+10.3f}{chosen:>10.3f}{rejected:>10.3f}")


def print_differences(job: Job, name: str, others: dict[str, str]) -> None:
    """Print what one model's held-out accuracy is above others', with 95 % intervals.

    `others` are labels and names as scored. Pairs of one fact are no independent evidence: facts
    are drawn again, not pairs (a paired bootstrap of 10,000).
    """
    fact_of = np.array([fact for fact, _ in truth(job.records["heldout"])])
    right = {}
    for other in (name, *others.values()):
        mean = mean_logps(LogprobStore(job.folder / "logprobs" / f"heldout-{other}"))
        right[other] = (mean[:, 0] > mean[:, 1]).double().numpy()
    facts = np.unique(fact_of)
    drawn = np.random.default_rng(1234).integers(len(facts), size=(10_000, len(facts)))
    print(f"\nInfiFPO's accuracy, points above (95 % over {len(facts)} facts, one seed)")
    for label, other in others.items():
        gain = 100 * (right[name] - right[other])
        of_fact = np.array([gain[fact_of == fact].mean() for fact in facts])
        low, high = np.quantile(of_fact[drawn].mean(axis=1), [0.025, 0.975])
        print(f"  {label:<10}{of_fact.mean():>+7.1f}  ({low:+.1f} to {high:+.1f})")


def print_pull(job: Job, sources: Path) -> None:
    """Print how hard the first step pulls at pairs whose label is right, or wrong.

    The pull is that of `study.why`: 1/2 for a pair whose reference is the policy itself.
    """
    labels = [1 if right else -1 for _, right in truth(job.records["preference"])]
    wrong = labels.count(-1)
    print(f"\npull of the first step on {len(labels) - wrong} pairs whose label is right, and on")
    print(f"{wrong} whose label is wrong; and how well it tells them apart (AUC, 0.5 by chance)")
    for label, options in PULLS.items():
        method = resolve("infifpo", **options)
        found = explain(method, (job.folder / "data" / "preference", sources), np.array(labels))
        pull = f"{found['coefficient_right']:>8.2f}{found['coefficient_wrong']:>8.2f}"
        print(f"  {label:<28}{pull}{found['auc']:>8.2f}")
