"""Every loss by name, what each needs, and the call that checks it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_infifpo.losses import lists, pairs
from megatron_infifpo.options import Option, declared, values_read

BETA = Option("strength of the KL constraint, or scale of the scores", range="(0, inf)")


@dataclass(frozen=True)
class Loss:
    """A loss, and what it needs beside the options that its signature declares.

    Attributes:
        function: `(policy [B, R], reference [B, R], ..., *, beta, **options)` to losses `[B]`. What
            else it takes, at a parameter that is no option, is a value of the row by that name,
            such as token_counts: one with a default is given where the row has it.
        responses: how many responses of a record it compares, of chosen, rejected, pivot_chosen;
            None: all there are, a list.
        several_pairs: it looks at the pairs of a row together, so `--micro-batch-size` changes it.
        beta: the published one for sums of log-probs.
        differences: a number added to all reference log-probs of a record changes nothing: only how
            they differ counts.
        teacher: its reference is what the policy learns from, and not what it is held to.
        most: its options to the most responses of a record that it takes; None: any number.
        residuals: of a list, with the same arguments: `[B, n]`, what is the same number for all
            responses of a record where the loss is lowest.
    """

    function: Callable[..., Tensor]
    responses: int | None = 2
    several_pairs: bool = False
    beta: float = 0.1
    differences: bool = False
    teacher: bool = False
    most: Callable[..., int | None] = lambda **options: None
    residuals: Callable[..., Tensor] | None = None

    @property
    def options(self) -> Mapping[str, Option]:
        """Its options beside beta."""
        return declared(self.function)

    @property
    def reads(self) -> Mapping[str, bool]:
        """Values of the row that it takes beside log-probs, and whether it needs them."""
        return values_read(self.function, 2)

    def __call__(self, policy: Tensor, reference: Tensor, **options: Any) -> Tensor:
        """Losses `[B]`, unchecked: see `preference_loss`."""
        return self.function(policy, reference, **options)


def _most_ranked(divergence: str = "kl") -> int:
    return lists.MOST_RANKED[divergence]


LOSSES: dict[str, Loss] = {
    "dpo": Loss(pairs.dpo, differences=True),
    "ipo": Loss(pairs.ipo, beta=0.004, differences=True),  # its 0.1 is for means
    "wrpo": Loss(pairs.wrpo, responses=3, beta=0.01, differences=True),
    "hinge": Loss(pairs.hinge, differences=True),
    "robust": Loss(pairs.robust, differences=True),
    "exo_pair": Loss(pairs.exo_pair, differences=True),
    "nca_pair": Loss(pairs.nca_pair),
    "bco_pair": Loss(pairs.bco_pair),
    "sppo_hard": Loss(pairs.sppo_hard),
    "aot": Loss(pairs.aot, several_pairs=True, differences=True),
    "aot_unpaired": Loss(pairs.aot_unpaired, several_pairs=True),
    "apo_zero": Loss(pairs.apo_zero),
    "apo_down": Loss(pairs.apo_down),
    "discopop": Loss(pairs.discopop, differences=True),
    "group_regression": Loss(
        lists.group_regression,
        responses=None,
        differences=True,
        residuals=lists.regression_residuals,
    ),
    "plackett_luce": Loss(
        lists.rankings,
        responses=None,
        beta=0.4,  # its 10 is for means
        differences=True,
        teacher=True,
        most=_most_ranked,
        residuals=lists.ranking_residuals,
    ),
}
# A mean needs a beta larger by about the length of a response: InfiFPO has 2.5 for DPO's 0.1.
MEANS_FACTOR = 25


def preference_loss(
    objective: str, policy_logps: Tensor, reference_logps: Tensor, *, beta: float, **options: Any
) -> Tensor:
    """Loss of every record, unreduced.

    Args:
        objective: a key of `LOSSES`.
        policy_logps: `[B, R]` with gradient.
        reference_logps: `[B, R]`, constants.
        beta: strength of the implied KL constraint; for means about 25 times that for sums.
        options: of the objective: label_smoothing, alpha (wrpo), discopop_tau, ...; and what it
            reads of a row: rewards and valid `[B, R]` of lists.

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
    needed = {n: option.required for n, option in loss.options.items()} | dict(loss.reads)
    for name, needs in needed.items():
        if needs and name not in options:
            raise ValueError(f"objective {objective!r} needs the option {name!r}")
    for name, option in {"beta": BETA, **loss.options}.items():
        value = options.get(name, beta if name == "beta" else option.default)
        grown = option.grows and value == 0  # before the first step
        if not grown and (expected := option.expected(value)):
            raise ValueError(f"{name} is {value!r}, expected {expected}")
    fewest = 2 if loss.responses is None else loss.responses
    if policy_logps.shape[1] < fewest:
        raise ValueError(
            f"policy_logps is {list(policy_logps.shape)}, expected {fewest} responses a record "
            f"for objective {objective!r}"
        )
    return loss(policy_logps, reference_logps.detach(), beta=beta, **options)
