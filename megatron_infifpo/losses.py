"""Preference losses: pure functions of policy and reference log-probs, one value a pair.

Every loss sees only the log-ratios `policy - reference` of each response, `[B, R]`, in the order
chosen, rejected[, the pivot's own chosen]. What the reference is (the initial pivot, or a fused
source model) and whether log-probs are sums or means is decided before, in `reference.py` and by
the method's preset.
"""

import inspect
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

CHOSEN, REJECTED, PIVOT_CHOSEN = 0, 1, 2


def dpo(log_ratios: Tensor, *, beta: float) -> Tensor:
    """Bradley-Terry loss, `-log sigmoid(beta d)` (Rafailov et al. 2023, eq. 7)."""
    return -F.logsigmoid(beta * (log_ratios[:, CHOSEN] - log_ratios[:, REJECTED]))


def ipo(log_ratios: Tensor, *, beta: float) -> Tensor:
    """Squared distance of d to `1 / (2 beta)` (Azar et al. 2023, eq. 17)."""
    return (log_ratios[:, CHOSEN] - log_ratios[:, REJECTED] - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo, "ipo": ipo}


def preference_loss(
    objective: str, policy_logps: Tensor, reference_logps: Tensor, *, beta: float, **options: float
) -> Tensor:
    """Loss of every pair, unreduced.

    Args:
        objective: a key of `LOSSES`.
        policy_logps: `[B, R]` with gradient.
        reference_logps: `[B, R]`, constants.
        beta: strength of the implied KL constraint; for means about 25 times that for sums.
        options: further arguments of the objective.

    Returns:
        `[B]` losses.

    Raises:
        ValueError: an unknown objective, or an option that has no effect for it.
    """
    if objective not in LOSSES:
        raise ValueError(f"objective is {objective!r}, expected one of {', '.join(LOSSES)}")
    loss = LOSSES[objective]
    accepted = inspect.signature(loss).parameters
    for name in options:
        if name not in accepted:
            raise ValueError(f"option {name!r} has no effect for objective {objective!r}")
    return loss(policy_logps - reference_logps.detach(), beta=beta, **options)
