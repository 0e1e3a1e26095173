"""A policy that can say anything of any prompt: a table of a few answers each, and its optimum.

Nothing but the loss decides where it ends. Loss and reference are those that training calls
(`training.objective.pair_losses`), of rows like those of training. Float64 throughout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_infifpo.methods import Method
from megatron_infifpo.pair_weights import pair_weights
from megatron_infifpo.rows import Row
from megatron_infifpo.source_values import standard_scales
from megatron_infifpo.training.objective import pair_losses

STEPS, ENOUGH = 3000, 1e-14  # of descent, at most so many; and the slope that ends them


@dataclass(frozen=True)
class Table:
    """What models say of K answers to each of P prompts, float64, and how often which pair comes.

    Attributes:
        initial: `[P, K]`, log-probs under the initial pivot.
        sources: `[P, K, M]`, under the sources.
        shares: `[P, K, K]`, how often the first of two answers is chosen and the second rejected.
    """

    initial: Tensor
    sources: Tensor
    shares: Tensor

    @property
    def pairs(self) -> Tensor:
        """Answers `[n, 2]`, chosen and rejected, of the pairs that come."""
        return self.shares.sum(dim=0).nonzero()

    def row(self, method: Method) -> Row:
        """The P n pairs as a row of training has them, every answer a token."""
        initial = self.initial[:, self.pairs].flatten(0, 1)
        sources = self.sources[:, self.pairs].flatten(0, 1)
        ones, sources_too = torch.ones_like(initial, dtype=torch.int64), sources.shape[-1] + 1
        equal = torch.ones(len(initial), sources_too, dtype=torch.float64)
        row: Row = {
            "initial_sum_logps": initial,
            "source_sum_logps": sources,
            "source_token_counts": torch.ones_like(sources, dtype=torch.int64),
            "source_mask": equal[:, 1:].bool(),
            "source_weights": equal,
            "source_scales": equal.clone(),
            "token_counts": ones,
            "valid": ones.bool(),
        }
        if method.standardised:
            row["source_scales"][:, :-1] = standard_scales(sources, initial, row["source_mask"])
        if method.pair_weights is not None:
            assert method.verdict_scale is not None
            row["pair_weights"] = pair_weights(
                method.pair_weights, sources, scale=method.verdict_scale, cut=method.verdict_cut
            )
        return row

    def weights(self) -> Tensor:
        """How often each of the row's pairs comes, `[P n]`."""
        chosen, rejected = self.pairs.unbind(dim=1)
        return self.shares[:, chosen, rejected].flatten()


def two_answers(
    initial: Sequence[Sequence[float]],
    sources: Sequence[Sequence[Sequence[float]]],
    q: Sequence[float],
) -> Table:
    """A table of prompts with the answers A and B.

    Args:
        initial: `[P][2]`, log-probs, which need not add up to 1: there may be other answers.
        sources: `[P][M][2]`.
        q: `[P]`, how often A is the chosen one.
    """
    share = torch.tensor(q, dtype=torch.float64)
    shares = torch.zeros(len(share), 2, 2, dtype=torch.float64)
    shares[:, 0, 1], shares[:, 1, 0] = share, 1 - share
    models = torch.tensor(sources, dtype=torch.float64).transpose(1, 2)
    return Table(torch.tensor(initial, dtype=torch.float64), models, shares)


def optimum(method: Method, table: Table, start: Tensor | None = None) -> Tensor:
    """The policy's log-probs `[P, K]` where the expected loss is lowest, by descent.

    Args:
        method: resolved, with DPO's loss and a reference that does not move with the policy.
        table: of the prompts.
        start: `[P, K]`, logits to descend from; None: the initial pivot's.
    """
    row, weights = table.row(method), table.weights()
    logits = (table.initial if start is None else start).clone().requires_grad_()
    step = 2 / method.beta**2  # one over the largest curvature: beta^2 / 4 of a pair, of two logits
    for _ in range(STEPS):
        sums = logits.log_softmax(dim=1)[:, table.pairs].flatten(0, 1)
        losses, _, _ = pair_losses(method, row, sums)
        (slope,) = torch.autograd.grad((weights * losses).sum(), logits)
        with torch.no_grad():
            logits -= step * slope
        if float(slope.abs().max()) < ENOUGH:
            break
    return logits.detach().log_softmax(dim=1)


def settled(method: Method, table: Table) -> Tensor:
    """Log-odds `[P]` of two answers where the loss's slope, with its reference there, changes sign.

    What descent ends at also where the reference jumps as the policy moves, by bisection.
    """
    row, weights = table.row(method), table.weights()
    low, high = (torch.full((len(table.initial),), x, dtype=torch.float64) for x in (-50.0, 50.0))
    for _ in range(60):
        theta = ((low + high) / 2).requires_grad_()
        logps = torch.stack([logsigmoid(theta), logsigmoid(-theta)], dim=1)
        losses, _, _ = pair_losses(method, row, logps[:, table.pairs].flatten(0, 1))
        (slope,) = torch.autograd.grad((weights * losses).sum(), theta)
        theta = theta.detach()
        low, high = torch.where(slope < 0, theta, low), torch.where(slope < 0, high, theta)
    return (low + high) / 2
