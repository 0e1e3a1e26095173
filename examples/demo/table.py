"""Tables of held-out pairs under the pivot before and after training."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import resolve
from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.objective import pair_losses

# float32 on both sides: what is left is the order of additions.
EXPORT_TOLERANCE = 1e-4


def check_export(logprobs: Path) -> None:
    """The exported model under transformers must give Megatron's log-probs of every token."""
    exported = LogprobStore(logprobs / "heldout-fused")
    trained = LogprobStore(logprobs / "heldout-fused-megatron")
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


def print_before_after(folder: Path, sources: Path) -> None:
    """Print accuracy, margin and InfiFPO's loss on the held-out pairs, by domain."""
    data = PreferenceDataset(folder / "data" / "heldout", read_sources(sources), responses=2)
    row = collate([data[i] for i in range(len(data))])
    domains = np.array([data.domains[code] for code in row["domain_codes"]])
    means, losses = [], []
    for name in ("pivot", "fused"):
        mean = mean_logps(LogprobStore(folder / "logprobs" / f"heldout-{name}"))
        means.append(mean)
        losses.append(pair_losses(resolve("infifpo"), row, mean * row["token_counts"])[0])
    print(f"{'held-out':<10}{'pairs':>6}{'accuracy':>19}{'margin':>21}{'loss':>21}")
    for domain in [*sorted(set(domains)), "all"]:
        inside = torch.from_numpy((domains == domain) | (domain == "all"))
        (accuracy0, margin0), (accuracy1, margin1) = (accuracy_and_margin(m[inside]) for m in means)
        loss0, loss1 = (loss[inside].mean().item() for loss in losses)
        print(
            f"{domain:<10}{int(inside.sum()):>6}{accuracy0:>10.1%} -> {accuracy1:>5.1%}"
            f"{margin0:>+10.3f} -> {margin1:>+7.3f}{loss0:>10.4f} -> {loss1:>7.4f}"
        )


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
