"""The demo's closing table: held-out pairs under the pivot before and after training."""

from pathlib import Path

import numpy as np
import torch

from megatron_infifpo.cli import UserError
from megatron_infifpo.data.logprob_store import LogprobStore
from megatron_infifpo.data.preference_dataset import PreferenceDataset
from megatron_infifpo.data.sources import read_sources
from megatron_infifpo.losses import preference_loss
from megatron_infifpo.reference import fuse_reference

BETA = 2.5
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


def mean_logps(store: LogprobStore) -> torch.Tensor:
    """`[N, 2]` mean log-probs of the chosen and the rejected responses."""
    rows = [store.sums(i) / store.counts(i) for i in range(len(store))]
    return torch.from_numpy(np.stack(rows))


def print_table(folder: Path) -> None:
    """Print accuracy, margin and loss on the held-out pairs, by domain, before and after."""
    data = PreferenceDataset(
        str(folder / "data" / "heldout"), read_sources(folder / "sources-heldout.yaml")
    )
    pairs = [data[i] for i in range(len(data))]
    sources = torch.tensor(
        np.stack([p.source_sum_logps / p.source_token_counts for p in pairs]), dtype=torch.float64
    )
    mask = torch.tensor(np.stack([p.source_mask for p in pairs]))
    domains = np.array([data.domains[p.domain_code] for p in pairs])
    before = mean_logps(LogprobStore(folder / "logprobs" / "heldout-pivot"))
    after = mean_logps(LogprobStore(folder / "logprobs" / "heldout-fused"))
    print(f"{'held-out':<10}{'pairs':>6}{'accuracy':>19}{'margin':>21}{'loss':>21}")
    for domain in [*sorted(set(domains)), "all"]:
        chosen = torch.from_numpy((domains == domain) | (domain == "all"))
        cells = []
        for policy in (before, after):
            fused = fuse_reference(
                sources, before, policy, torch.tensor([True, False]), source_mask=mask
            )
            loss = preference_loss("dpo", policy, fused.logps, beta=BETA)[chosen].mean()
            gap = (policy[:, 0] - policy[:, 1])[chosen]
            cells.append(((gap > 0).double().mean(), gap.mean(), loss))
        (acc0, gap0, loss0), (acc1, gap1, loss1) = cells
        print(
            f"{domain:<10}{int(chosen.sum()):>6}{acc0:>10.1%} -> {acc1:>5.1%}"
            f"{gap0:>+10.3f} -> {gap1:>+7.3f}{loss0:>10.4f} -> {loss1:>7.4f}"
        )
