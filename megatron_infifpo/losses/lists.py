"""Losses of lists: any number of responses of a prompt, in any order, with or without rewards.

Shapes `[B, n]`: B prompts, n responses of the longest list. `valid` says which of them are there;
what stands where it is false, be it NaN, changes neither a loss nor a gradient.
"""

import math
from typing import Annotated, Any

import torch
from torch import Tensor

from megatron_infifpo.options import Option

# The most responses that a divergence takes: it looks at 2^n sets of them, or at n! rankings.
MOST_RANKED = {"kl": 10, "jsd": 5}
# Far above every score, which are at most 0 then: a response that is absent is ranked first for
# certain (`exp` of the distance is 0 in any type), by student and teacher alike.
_FIRST = 1e4

_NORMALIZATIONS = ("none", "group")
RewardScale = Annotated[float, Option("multiplies the rewards", range="(0, inf)")]
RewardNormalization = Annotated[
    str,
    Option(
        "rewards as they are, or their z-scores in the group: the responses of a prompt",
        choices=_NORMALIZATIONS,
    ),
]
Divergence = Annotated[
    str,
    Option(
        "of the policy's rankings from the sources': Kullback-Leibler's, or Jensen and Shannon's",
        choices=MOST_RANKED,
    ),
]


def valid_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of each prompt's valid values, `[B, 1]`; 0 where there are none. Others may be NaN."""
    total = torch.where(valid, values, 0.0).sum(dim=1, keepdim=True)
    return total / valid.sum(dim=1, keepdim=True).clamp_min(1)


def _variance(values: Tensor, valid: Tensor) -> Tensor:
    """Sample variance of each prompt's valid values, `[B]`; 0 where there are fewer than two."""
    off = torch.where(valid, values - valid_mean(values, valid), 0.0)
    return off.square().sum(dim=1) / (valid.sum(dim=1) - 1).clamp_min(1)


def deviation(values: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation of each prompt's valid values, `[B]`; 0 where there are fewer than two."""
    return _variance(values, valid).sqrt()


def _all_valid(like: Tensor, valid: Tensor | None) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if valid is None else valid


def group_regression(
    policy_logps: Tensor,
    reference_logps: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    valid: Tensor | None = None,
    reward_scale: RewardScale = 1.0,
    reward_normalization: RewardNormalization = "none",
) -> Tensor:
    """Sample variance of `R = r - beta (log pi - log M)` over a prompt's responses, / (2 beta).

    At `pi = M exp(r / beta) / Z`, the optimum of `E[r] - beta KL(pi || M)`, R is beta log Z for
    every response, and there alone R is constant: whichever policy the responses are drawn from.
    The gradient is `-1 / (n - 1) sum_i (R_i - mean R) grad log pi(y_i)`: for responses of pi, the
    policy gradient whose baseline is the mean of the other n - 1.

    Sources: the objective of FuseRLHF, where `log M = sum_m gamma_m log M_m`; the baseline of RLOO
    (arXiv 2402.14740); the regression, for pairs, of REBEL (arXiv 2404.16767).

    Args:
        policy_logps: `[B, n]`, with gradient.
        reference_logps: `[B, n]`, constants; M need not add up to 1.
        rewards: `[B, n]`, in float64 if they are far from 0: they are centred before all else.
        beta: strength of the KL constraint.
        valid: bool `[B, n]`, the responses that are there; None: all of them.
        reward_scale: multiplies the rewards, once they are normalised.
        reward_normalization: "group": `(r - mean) / std` over the prompt's valid responses, with
            the sample standard deviation; 0 where their rewards are equal. The optimum is another
            one then: what a reward is worth depends on those that it was drawn with.

    Returns:
        `[B]` losses; 0 where fewer than 2 responses are valid.

    Raises:
        ValueError: an unknown normalisation, or shapes that do not fit.
    """
    valid = _all_valid(policy_logps, valid)
    _check_shapes(policy_logps, reference_logps=reference_logps, rewards=rewards, valid=valid)
    # Large rewards of like size differ by what float32 rounds away; their mean changes nothing.
    centred = (rewards - valid_mean(rewards, valid)).to(policy_logps.dtype)
    found = regression_residuals(
        policy_logps,
        reference_logps,
        centred,
        beta=beta,
        valid=valid,
        reward_scale=reward_scale,
        reward_normalization=reward_normalization,
    )
    return _variance(found, valid) / (2 * beta)


def regression_residuals(
    policy: Tensor,
    reference: Tensor,
    rewards: Tensor,
    *,
    beta: float,
    valid: Tensor | None = None,
    reward_scale: float = 1.0,
    reward_normalization: str = "none",
) -> Tensor:
    """R of each response, `[B, n]`, of `group_regression`'s arguments; 0 where it is not valid."""
    if reward_normalization not in _NORMALIZATIONS:
        known = ", ".join(_NORMALIZATIONS)
        raise ValueError(f"reward_normalization is {reward_normalization!r}, expected {known}")
    valid = _all_valid(policy, valid)
    _check_shapes(policy, reference_logps=reference, rewards=rewards, valid=valid)
    if reward_normalization == "group":
        rewards = _z_scores(rewards, valid)
    # All of it is linear, so the gradient of what is absent is 0, and no NaN is multiplied by it.
    ratios = policy - reference.detach()
    return torch.where(valid, reward_scale * rewards.detach() - beta * ratios, 0.0)


def _z_scores(rewards: Tensor, valid: Tensor) -> Tensor:
    """`(r - mean) / std` over each prompt's valid rewards; 0 where they are equal."""
    highest = torch.where(valid, rewards, -math.inf).amax(dim=1, keepdim=True)
    lowest = torch.where(valid, rewards, math.inf).amin(dim=1, keepdim=True)
    # Equal ones need not be equal to their rounded mean, and their deviation would be noise.
    differ = highest > lowest
    scores = (rewards - valid_mean(rewards, valid)) / deviation(rewards, valid)[:, None]
    return torch.where(differ & valid, scores, 0.0)


def plackett_luce(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    divergence: Divergence = "kl",
    valid: Tensor | None = None,
) -> Tensor:
    """Divergence between the rankings of n responses by a teacher and by a student.

    A model's scores s give every ranking a probability: the first is drawn with `softmax(s)`, the
    next with the softmax of those that are left, and so on (Plackett and Luce). "kl" is
    `KL(teacher || student)`, exactly: a ranking's log-prob is a sum over the sets of responses that
    are left as it is drawn, so the expectation needs the probability of each set, and not of each
    ranking. "jsd" is half the sum of both rankings' KL from their mixture.

    Source: PAD (arXiv 2502.14272); with two responses it is DPO on soft labels.

    Args:
        student_scores: `[B, n]`, with gradient. A constant added to a prompt's scores, of either
            side, changes nothing.
        teacher_scores: `[B, n]`, constants.
        divergence: "kl" for at most 10 responses, "jsd" for at most 5.
        valid: bool `[B, n]`, the responses that are there; None: all of them.

    Returns:
        `[B]` losses in nats; 0 where fewer than 2 responses are valid.

    Raises:
        ValueError: an unknown divergence, too many responses, or shapes that do not fit.
    """
    if divergence not in MOST_RANKED:
        known = ", ".join(MOST_RANKED)
        raise ValueError(f"divergence is {divergence!r}, expected {known}")
    valid = _all_valid(student_scores, valid)
    _check_shapes(student_scores, teacher_scores=teacher_scores, valid=valid)
    responses, most = student_scores.shape[1], MOST_RANKED[divergence]
    if responses > most:
        raise ValueError(
            f"student_scores is {list(student_scores.shape)}: {responses} responses, expected at "
            f"most {most} for the divergence {divergence!r}"
        )
    student, teacher = (_centred(x, valid) for x in (student_scores, teacher_scores.detach()))
    if divergence == "kl":
        return _kl_by_sets(student, teacher)
    ours, theirs = _log_rankings(student), _log_rankings(teacher)
    mixture = torch.logaddexp(ours, theirs) - math.log(2)
    terms = theirs.exp() * (theirs - mixture) + ours.exp() * (ours - mixture)
    return terms.sum(dim=1) / 2


def rankings(
    policy: Tensor,
    reference: Tensor,
    *,
    beta: float,
    valid: Tensor | None = None,
    divergence: Divergence = "kl",
) -> Tensor:
    """`plackett_luce` of beta times the policy's log-probs, and beta times its teacher's."""
    return plackett_luce(beta * policy, beta * reference, divergence=divergence, valid=valid)


def ranking_residuals(
    policy: Tensor, reference: Tensor, *, beta: float, valid: Tensor | None = None, **rest: Any
) -> Tensor:
    """`beta (policy - reference)`, `[B, n]`, of `rankings`' arguments; 0 where it is not valid."""
    return torch.where(_all_valid(policy, valid), beta * (policy - reference), 0.0)


def _check_shapes(first: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.shape != first.shape or first.dim() != 2:
            raise ValueError(
                f"{name} is {list(tensor.shape)} beside log-probs or scores of shape "
                f"{list(first.shape)}, expected [B, n] for both"
            )


def _centred(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores less the highest of their prompt; those that are absent come first for certain."""
    highest = torch.where(valid, scores.detach(), -math.inf).amax(dim=1, keepdim=True)
    first = _FIRST * torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=scores.dtype)
    return torch.where(valid, scores - highest, first)


def _log_normalizers(scores: Tensor) -> Tensor:
    """Log of the sum of exp over every set of responses, `[B, 2^n]`.

    Response i is in the set number S where bit i of S is set.
    """
    logs = torch.full_like(scores[:, :1], -math.inf)
    for score in scores.split(1, dim=1):
        logs = torch.cat([logs, torch.logaddexp(logs, score)], dim=1)
    return logs


def _kl_by_sets(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(teacher || student)`: a ranking's log-prob is `sum_i s_i - sum_S log Z(S)`, `[B]`.

    S runs over the sets that are left as it is drawn; the teacher's rankings leave S with a
    probability that the sets with one response more give.
    """
    ours, theirs = _log_normalizers(student), _log_normalizers(teacher)
    now = torch.zeros_like(theirs)  # probability of what is left after so many draws
    now[:, -1] = 1
    left = now
    for _ in range(student.shape[1] - 1):
        after = torch.zeros_like(now)
        for i, score in enumerate(teacher.split(1, dim=1)):
            # Sets without and with response i, which is drawn from the latter.
            halves = (now.shape[0], -1, 2, 2**i)
            share = (score[..., None] - theirs.view(halves)[:, :, 1]).exp()
            after.view(halves)[:, :, 0] += now.view(halves)[:, :, 1] * share
        left, now = left + after, after
    sets = left * (ours - theirs)
    return (teacher - student).sum(dim=1) + sets[:, 1:].sum(dim=1)  # of the empty one it is NaN


def _log_rankings(scores: Tensor) -> Tensor:
    """Log-probs of all rankings, `[B, n!]`, in the same order for all scores."""
    logs, responses = _log_normalizers(scores), range(scores.shape[1])
    found = [torch.zeros_like(scores[:, :1])]  # of every set's rankings; here of the empty one
    for left in range(1, 2 ** len(responses)):
        drawn = [
            (scores[:, i] - logs[:, left])[:, None] + found[left & ~(1 << i)]
            for i in responses
            if left >> i & 1
        ]
        found.append(torch.cat(drawn, dim=1))
    return found[-1]
