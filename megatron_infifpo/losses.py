"""Preference losses: pure functions of policy and reference log-probs, one value a pair.

Every loss takes two tensors `[B, R]` with the responses in the order chosen, rejected[, the pivot's
own chosen]. What the reference is (the initial pivot or a fused source model) and whether log-probs
are sums or means is decided before, by the method's preset and in `reference.py`.

Names: the log-ratio of a response is `policy - reference`, d the chosen one's minus the rejected
one's, `beta * log-ratio` the implicit reward.

A loss declares its options at its keyword arguments and what else it needs in `LOSSES`; flags,
help texts and checks follow from that. To add one, see docs/adding-a-loss.md.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_infifpo.options import Option, declared

CHOSEN, REJECTED, PIVOT_CHOSEN = 0, 1, 2
BETA = Option("strength of the KL constraint", range="(0, inf)")

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


@dataclass(frozen=True)
class Loss:
    """A loss, and what it needs beside the options that its signature declares.

    Attributes:
        function: `(policy [B, R], reference [B, R], *, beta, **options)` to losses `[B]`. A keyword
            argument that is a Tensor is a value of the row by that name, such as token_counts.
        responses: how many responses of a record it compares, of chosen, rejected, pivot_chosen.
        several_pairs: it looks at the pairs of a row together, so `--micro-batch-size` changes it.
        beta: the published one for sums of log-probs.
    """

    function: Callable[..., Tensor]
    responses: int = 2
    several_pairs: bool = False
    beta: float = 0.1

    @property
    def options(self) -> Mapping[str, Option]:
        """Its options beside beta."""
        return declared(self.function)

    @property
    def reads(self) -> tuple[str, ...]:
        """Values of the row that it takes beside log-probs."""
        parameters = inspect.signature(self.function).parameters.values()
        names = (p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "beta")
        return tuple(name for name in names if name not in self.options)

    def __call__(self, policy: Tensor, reference: Tensor, **options: Any) -> Tensor:
        """Losses `[B]`, unchecked: see `preference_loss`."""
        return self.function(policy, reference, **options)


LOSSES: dict[str, Loss] = {
    "dpo": Loss(dpo),
    "ipo": Loss(ipo, beta=0.004),  # its 0.1 is for means
    "wrpo": Loss(wrpo, responses=3, beta=0.01),
    "hinge": Loss(hinge),
    "robust": Loss(robust),
    "exo_pair": Loss(exo_pair),
    "nca_pair": Loss(nca_pair),
    "bco_pair": Loss(bco_pair),
    "sppo_hard": Loss(sppo_hard),
    "aot": Loss(aot, several_pairs=True),
    "aot_unpaired": Loss(aot_unpaired, several_pairs=True),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "discopop": Loss(discopop),
}
# A mean needs a beta larger by about the length of a response: InfiFPO has 2.5 for DPO's 0.1.
MEANS_FACTOR = 25


def preference_loss(
    objective: str, policy_logps: Tensor, reference_logps: Tensor, *, beta: float, **options: Any
) -> Tensor:
    """Loss of every pair, unreduced.

    Args:
        objective: a key of `LOSSES`.
        policy_logps: `[B, R]` with gradient.
        reference_logps: `[B, R]`, constants.
        beta: strength of the implied KL constraint; for means about 25 times that for sums.
        options: of the objective: label_smoothing, alpha (wrpo), discopop_tau; and what it reads.

    Returns:
        `[B]` losses.

    Raises:
        ValueError: an unknown objective, an option that has no effect for it, one that it needs
            and does not get, a value out of its range, or too few responses.
    """
    if objective not in LOSSES:
        raise ValueError(f"objective is {objective!r}, expected one of {', '.join(LOSSES)}")
    loss = LOSSES[objective]
    for name in options:
        if name not in loss.options and name not in loss.reads:
            raise ValueError(f"option {name!r} has no effect for objective {objective!r}")
    for name in (*(n for n, option in loss.options.items() if option.required), *loss.reads):
        if name not in options:
            raise ValueError(f"objective {objective!r} needs the option {name!r}")
    for name, option in {"beta": BETA, **loss.options}.items():
        value = options.get(name, beta if name == "beta" else option.default)
        grown = option.grows and value == 0  # before the first step
        if not grown and (expected := option.expected(value)):
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    if policy_logps.shape[1] < loss.responses:
        raise ValueError(
            f"policy_logps is {list(policy_logps.shape)}, expected {loss.responses} responses a "
            f"pair for objective {objective!r}"
        )
    return loss(policy_logps, reference_logps.detach(), beta=beta, **options)
