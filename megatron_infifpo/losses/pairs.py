"""Losses of pairs: two responses, or three, in the order chosen, rejected[, pivot_chosen].

Names: the log-ratio of a response is `policy - reference`, d the chosen one's minus the rejected
one's, `beta * log-ratio` the implicit reward.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_infifpo.options import Option

CHOSEN, REJECTED, PIVOT_CHOSEN = 0, 1, 2

_WRONG = "share of labels taken to be wrong"
Smoothing = Annotated[float, Option(_WRONG, range="[0, 0.5)")]
SomeSmoothing = Annotated[float, Option(_WRONG, range="(0, 0.5)")]


def _gap(logps: Tensor) -> Tensor:
    """Chosen minus rejected, `[B]`."""
    return logps[:, CHOSEN] - logps[:, REJECTED]


def _logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-log sigmoid, with labels that are wrong with probability `label_smoothing`."""
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    return loss


def dpo(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """`-log sigmoid(beta d)` (Rafailov et al. 2023, eq. 7); smoothed: conservative DPO."""
    return _logistic(beta * _gap(policy - reference), label_smoothing)


def ipo(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Squared distance of d to `1 / (2 beta)` (Azar et al. 2023, eq. 17)."""
    return (_gap(policy - reference) - 1 / (2 * beta)) ** 2


def wrpo(
    policy: Tensor,
    reference: Tensor,
    *,
    beta: float,
    alpha: Annotated[
        float,
        Option("weight of the sources' best response", range="[0, 1]", default=0.1, grows=True),
    ],
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """DPO's with two preferred responses (WRPO, arXiv 2412.03187).

    `alpha` weighs the sources' best response (chosen) against the pivot's own best.
    """
    ratios = policy - reference
    preferred = alpha * ratios[:, CHOSEN] + (1 - alpha) * ratios[:, PIVOT_CHOSEN]
    return _logistic(beta * (preferred - ratios[:, REJECTED]), label_smoothing)


def hinge(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """`max(0, 1 - beta d)` (SLiC-HF's loss on DPO's rewards; Liu et al. 2023, eq. 2)."""
    return torch.relu(1 - beta * _gap(policy - reference))


def robust(
    policy: Tensor,
    reference: Tensor,
    *,
    beta: float,
    label_smoothing: Annotated[
        float,
        Option(_WRONG, range="(0, 0.5)", why="which it corrects for; without it, it is dpo"),
    ],
) -> Tensor:
    """DPO, unbiased under labels flipped at the rate `label_smoothing` (arXiv 2403.00409)."""
    margin = beta * _gap(policy - reference)
    kept, flipped = F.logsigmoid(margin), F.logsigmoid(-margin)
    return (label_smoothing * flipped - (1 - label_smoothing) * kept) / (1 - 2 * label_smoothing)


def exo_pair(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: SomeSmoothing = 1e-3
) -> Tensor:
    """Reverse KL to the smoothed label over the two responses (EXO, arXiv 2402.00856, eq. 16)."""
    margin = beta * _gap(policy - reference)
    smoothing = margin.new_full((), label_smoothing)
    log_win, log_lose = F.logsigmoid(margin), F.logsigmoid(-margin)
    win = torch.sigmoid(margin) * (log_win - torch.log1p(-smoothing))
    return win + torch.sigmoid(-margin) * (log_lose - smoothing.log())


def nca_pair(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Each response's reward against zero (NCA for pairs, arXiv 2402.05369)."""
    rewards = beta * (policy - reference)
    up = F.logsigmoid(rewards[:, CHOSEN])
    down = F.logsigmoid(-rewards[:, CHOSEN]) + F.logsigmoid(-rewards[:, REJECTED])
    return -up - 0.5 * down


def bco_pair(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Classify each response by its reward (BCO, arXiv 2404.04656, without its reward shift)."""
    rewards = beta * (policy - reference)
    return -F.logsigmoid(rewards[:, CHOSEN]) - F.logsigmoid(-rewards[:, REJECTED])


def sppo_hard(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Log-ratios to +-1 / (2 beta) (SPPO with certain labels, arXiv 2405.00675, eq. 4.7)."""
    ratios = policy - reference
    return (ratios[:, CHOSEN] - 0.5 / beta) ** 2 + (ratios[:, REJECTED] + 0.5 / beta) ** 2


def aot(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """DPO's between the sorted margins of policy and reference (AOT, arXiv 2406.05882).

    It looks at pairs together: it sorts the B pairs that it is given, which in training are those
    of a row, so it depends on `--micro-batch-size`.
    """
    ranks = _gap(policy).argsort().argsort()
    margin = _gap(policy) - _gap(reference).sort().values[ranks]
    return _logistic(beta * margin, label_smoothing)


def aot_unpaired(
    policy: Tensor, reference: Tensor, *, beta: float, label_smoothing: Smoothing = 0.0
) -> Tensor:
    """DPO's between the sorted log-ratios of all chosen and of all rejected responses.

    As `aot` it depends on which pairs share a row (arXiv 2406.05882, the unpaired case).
    """
    ratios = policy - reference
    ranks = ratios[:, CHOSEN].argsort().argsort()
    margin = ratios[:, CHOSEN] - ratios[:, REJECTED].sort().values[ranks]
    return _logistic(beta * margin, label_smoothing)


def apo_zero(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Chosen up, rejected down (APO-zero, arXiv 2408.06266, eq. 7)."""
    rewards = beta * (policy - reference)
    return torch.sigmoid(-rewards[:, CHOSEN]) + torch.sigmoid(rewards[:, REJECTED])


def apo_down(policy: Tensor, reference: Tensor, *, beta: float) -> Tensor:
    """Chosen down, rejected further down (APO-down, arXiv 2408.06266, eq. 8)."""
    rewards = beta * (policy - reference)
    return torch.sigmoid(rewards[:, CHOSEN]) + torch.sigmoid(-_gap(rewards))


def discopop(
    policy: Tensor,
    reference: Tensor,
    *,
    beta: float,
    discopop_tau: Annotated[float, Option("temperature", range="(0, 1)")] = 0.05,
) -> Tensor:
    """Log-ratio modulated loss, found by search (DiscoPOP, arXiv 2406.08414, eq. 5)."""
    margin = beta * _gap(policy - reference)
    mixed = -F.logsigmoid(margin) * torch.sigmoid(-margin / discopop_tau)
    # exp(-m) sigmoid(m / tau) in one exponential: apart, exp overflows where the sigmoid is 0.
    return mixed + torch.exp(F.logsigmoid(margin / discopop_tau) - margin)
