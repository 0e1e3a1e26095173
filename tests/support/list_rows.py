"""A row of lists without a model: what `rows/packing.py` and the stored log-probs would give."""

from typing import Any

import torch

LENGTHS = torch.tensor([4, 2, 3, 1])  # responses of each prompt; one is no comparison
SOURCES, DOMAINS = ("a", "b"), ("code", "math", "law")


def list_row(seed: int = 3, filler: float = 0.0) -> dict[str, Any]:
    """Four prompts with up to 4 responses and two sources, in float64.

    The second source is masked for the second prompt. Stored values of absent responses are
    `filler`; the policy's sums of them are 0, as training has them.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    shape = (4, 4)
    valid = torch.arange(4) < LENGTHS[:, None]
    counts = torch.where(valid, torch.randint(1, 9, shape, generator=generator), 0)
    theirs = torch.where(valid, torch.randint(1, 9, shape, generator=generator), 1)
    rewards = random(*shape).float()
    there = valid[..., None]
    return {
        "valid": valid,
        "token_counts": counts,
        "rewards": torch.where(valid, rewards, 0.0),
        "ended": valid & (random(*shape) < 0.6),
        "initial_sum_logps": torch.where(valid, -2 * random(*shape) * counts, filler),
        "source_sum_logps": torch.where(there, -3 * random(*shape, 2) * theirs[..., None], filler),
        "source_token_counts": theirs[..., None].expand(-1, -1, 2),
        "source_mask": torch.tensor([[True, True], [True, False], [True, True], [True, True]]),
        "source_weights": torch.tensor([[2.0, 3.0, 5.0]]).expand(4, -1),
        "domain_codes": torch.tensor([0, 1, 0, 1]),
        "indices": torch.arange(4),
    }


def policy_sums(row: dict[str, Any]) -> torch.Tensor:
    """A policy away from the initial pivot; 0 where there is no response."""
    away = torch.linspace(0.5, 1.7, row["valid"].numel(), dtype=torch.float64)
    return torch.where(row["valid"], row["initial_sum_logps"] * away.view(row["valid"].shape), 0.0)
