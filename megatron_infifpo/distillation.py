"""What a policy learns from others' distributions over tokens: pure functions, one value a row.

A teacher gives probabilities of its `k` most probable ids and of all others together, its tail.
Scaling the `k` up to 1 instead pulls the policy away from its teacher even where both agree.
"""

import torch
from torch import Tensor


def ghost_kl(student_logps: Tensor, teacher_probs: Tensor, teacher_tail: Tensor) -> Tensor:
    """KL(teacher || student) over `k` ids and one more class for all the others.

    At most the KL over the whole vocabulary, and equal to it for `k = V`. Its gradient with respect
    to the logits is `q - p` at the `k` ids, so a student that agrees is left alone.

    Args:
        student_logps: `[R, k]`, log-probs over the whole vocabulary.
        teacher_probs: `[R, k]`, probabilities at the same ids; 0 at padding.
        teacher_tail: `[R]`, the probability of all other ids: with the former it makes 1.

    Returns:
        `[R]`, in nats.
    """
    kept = teacher_probs > 0
    logps = torch.where(kept, student_logps, 0.0)
    there = (torch.xlogy(teacher_probs, teacher_probs) - teacher_probs * logps).sum(dim=-1)
    mass = torch.where(kept, logps.exp(), 0.0).sum(dim=-1)
    # As much as the data type can tell from 1: a student that is surer still is pulled back, but
    # by less than it would be if its tail were known.
    most = 1 - 8 * torch.finfo(mass.dtype).eps
    mass = mass + (mass.clamp_max(most) - mass).detach()
    rest = torch.xlogy(teacher_tail, teacher_tail) - teacher_tail * torch.log1p(-mass)
    return there + rest


def renormalised_kl(student_logps: Tensor, teacher_probs: Tensor) -> Tensor:
    """KL(teacher || student) with the teacher's `k` ids scaled up to 1, as FuseLLM has it.

    A student that agrees with the teacher is not left alone: the gradient there is `q - q / Q` at
    the `k` ids, of the student's mass `Q`.

    Args:
        student_logps: `[R, k]`, log-probs over the whole vocabulary.
        teacher_probs: `[R, k]`; 0 at padding.

    Returns:
        `[R]`, in nats; 0 where a row has no id.
    """
    mass = teacher_probs.sum(dim=-1, keepdim=True)
    probs = torch.where(mass > 0, teacher_probs / mass.clamp_min(1e-30), 0.0)
    logps = torch.where(teacher_probs > 0, student_logps, 0.0)
    return (torch.xlogy(probs, probs) - probs * logps).sum(dim=-1)


def topk_standardised_l1(
    student_topk: Tensor, teacher_topk: Tensor, *, temperature: float = 1.0, unbiased: bool = True
) -> Tensor:
    """Distance of two sorted top-k distributions, each standardised first: InfiFusion's ULD.

    `sum_i |softmax(n(s) / T)_i - softmax(n(t) / T)_i|` with `n(x) = (x - mean x) / std x`. Ids play
    no part, and neither do a scale and a shift of the logits, so confidence does not either; with
    `k` of 1 or 2 it is 0. The published text leaves open which standard deviation it takes.

    Args:
        student_topk, teacher_topk: `[R, k]`, the log-probs (or logits) of each one's own `k` most
            probable ids, falling.
        temperature: T.
        unbiased: the standard deviation divides by `k - 1`, else by `k`.

    Returns:
        `[R]`, in [0, 2].
    """
    correction = int(unbiased and student_topk.shape[-1] > 1)
    scaled = (_standardised(x, correction) for x in (student_topk, teacher_topk))
    return topk_l1(*scaled, temperature=temperature)


def topk_l1(student_topk: Tensor, teacher_topk: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Distance of two sorted top-k distributions, as `topk_standardised_l1` without its scaling.

    For `k = V` it is the universal logit distillation of arXiv 2402.12030.
    """
    student, teacher = (torch.softmax(x / temperature, -1) for x in (student_topk, teacher_topk))
    return (student - teacher).abs().sum(dim=-1)


def _standardised(values: Tensor, correction: int) -> Tensor:
    # Values that hardly differ would have an immense gradient, and one such row be the whole step.
    variance = values.var(dim=-1, correction=correction, keepdim=True).clamp_min(1e-6)
    return (values - values.mean(dim=-1, keepdim=True)) / variance.sqrt()


def chunk_binary_kl(student_logp: Tensor, teacher_logp: Tensor, *, tau: float = 100.0) -> Tensor:
    """Compare how likely two models find the same text, whatever tokens each makes of it.

    `tau KL(Bernoulli(t) || Bernoulli(s))` with `t = p_T^(1/tau)` and `s = p_S^(1/tau)`: the
    approximate likelihood matching of arXiv 2503.20083. For a large tau it tends to
    `log(p_T / p_S) - log p_T log(log p_T / log p_S)`.

    Args:
        student_logp, teacher_logp: `[C]`, summed log-probs of a chunk's tokens.
        tau: evens out chunks; 1 compares the likelihoods as they are.

    Returns:
        `[C]`, at least 0.
    """
    student, teacher = ((x / tau).clamp_max(-1e-6) for x in (student_logp, teacher_logp))
    there = teacher.exp()
    rest = (1 - there) * (_log1mexp(teacher) - _log1mexp(student))
    return tau * (there * (teacher - student) + rest)


def bucket_logps(logps: Tensor, buckets: Tensor, count: int) -> Tensor:
    """Log of the summed probabilities of every bucket of ids.

    Args:
        logps: `[R, m]`, log-probs at ids.
        buckets: int64 `[R, m]`, which of the `count` buckets of its row an id is in; below 0: none.
        count: buckets of a row, `k`.

    Returns:
        `[R, k]`; 0 for an empty bucket, without a gradient.
    """
    places = torch.where(buckets < 0, count, buckets)
    shape = (len(logps), count + 1)
    highest = logps.new_full(shape, -torch.inf)
    highest = highest.scatter_reduce(1, places, logps.detach(), "amax")
    empty = highest.isinf()
    highest = highest.masked_fill(empty, 0.0)
    shares = (logps - highest.gather(1, places)).exp()
    sums = logps.new_zeros(shape).scatter_add(1, places, shares).masked_fill(empty, 1.0)
    return (sums.log() + highest)[:, :count]


def _log1mexp(values: Tensor) -> Tensor:
    """`log(1 - exp(x))` of negative x, to full precision at both ends."""
    return torch.where(
        values > -0.6931, torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values))
    )
