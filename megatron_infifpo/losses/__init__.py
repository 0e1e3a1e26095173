"""Preference losses: pure functions of policy and reference log-probs, one value a record.

Every one takes two tensors `[B, R]`, one number for each response of a record: a pair's in the
order chosen, rejected[, the pivot's own chosen] (`pairs.py`), or a list's in any order
(`lists.py`). What the reference is (the initial pivot or a fused source model) and whether
log-probs are sums or means is decided before, by the method's preset and in `reference.py`.

A loss of single tokens (`tokens.py`) takes the policy's log-probs of a response, and what sources
say of its tokens; it has no reference.

A loss declares its options at its keyword arguments and what else it needs in `LOSSES` or
`TOKEN_LOSSES`; flags, help texts and checks follow from that. To add one, see
docs/adding-a-loss.md.
"""

from megatron_infifpo.losses.lists import group_regression, plackett_luce
from megatron_infifpo.losses.pairs import CHOSEN, PIVOT_CHOSEN, REJECTED
from megatron_infifpo.losses.registry import (
    BETA,
    LOSSES,
    MEANS_FACTOR,
    Loss,
    preference_loss,
)
from megatron_infifpo.losses.tokens import TOKEN_LOSSES, TokenLoss

__all__ = [
    "BETA",
    "CHOSEN",
    "LOSSES",
    "MEANS_FACTOR",
    "PIVOT_CHOSEN",
    "REJECTED",
    "TOKEN_LOSSES",
    "Loss",
    "TokenLoss",
    "group_regression",
    "plackett_luce",
    "preference_loss",
]
