"""Losses of every token of one response: cross-entropy, alone or with what sources say of a token.

    FuseLLM    https://arxiv.org/abs/2401.10491     soft targets, fused from all sources
    FuseChat   https://arxiv.org/abs/2408.07990     the same from one source; models are merged then
    InfiFusion https://arxiv.org/abs/2501.02795     sorted top-k values of all sources

`logprobs` are `[K, 1 + k]`: in the first column those of the tokens of the response, then those
that the loss asks for. Every row t is about the distribution that predicts token t.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from megatron_infifpo.distillation import (
    bucket_logps,
    chunk_binary_kl,
    ghost_kl,
    renormalised_kl,
    topk_l1,
    topk_standardised_l1,
)
from megatron_infifpo.options import Option, declared, values_read


class Part(NamedTuple):
    """A part of a loss, by token."""

    values: Tensor
    """`[K]`, 0 where the part is not there."""
    counts: Tensor
    """`[K]`, how often it is there."""


class TokenLosses(NamedTuple):
    """What is trained on, and what it is made of."""

    losses: Tensor
    """`[K]`"""
    parts: Mapping[str, Part]
    """By name, without their weights."""


def cross_entropy(logprobs: Tensor) -> TokenLosses:
    """Cross-entropy of the response: SFT."""
    return TokenLosses(-logprobs[:, 0], {})


def soft_targets(
    logprobs: Tensor,
    soft_probs: Tensor,
    soft_tail: Tensor,
    soft_sources: Tensor,
    chunk_rows: Tensor,
    chunk_of: Tensor,
    chunk_starts: Tensor,
    chunk_logps: Tensor,
    chunk_weights: Tensor,
    soft_buckets: Tensor | None = None,
    *,
    lm_weight: Annotated[
        float, Option("share of cross-entropy where a token has a soft target", range="[0, 1]")
    ] = 0.9,
    tail: Annotated[
        str,
        Option(
            "what is left of a source outside its top k: ghost, one more class, or renormalised, "
            "nothing, with the top k scaled up to 1 as published",
            choices=("ghost", "renormalised"),
        ),
    ] = "ghost",
    chunk_weight: Annotated[
        float,
        Option(
            "weight of a text that both models cut in other tokens, as a share of a token's",
            range="[0, inf)",
        ),
    ] = 1.0,
    chunk_temperature: Annotated[
        float, Option("tau of the likelihoods of such texts", range="(0, inf)")
    ] = 100.0,
) -> TokenLosses:
    """SFT with soft targets: `lm CE + (1 - lm) KL(target || policy)`, and CE where there is none.

    Texts that are several tokens for the policy or for a source have no target of their ids; there
    `(1 - lm) chunk_weight` times the difference of their likelihoods is added to CE. What the row
    has of targets is what `rows.soft_targets.collate_targets` makes.
    """
    observed, students = logprobs[:, 0], logprobs[:, 1:]
    if soft_buckets is not None:
        students = bucket_logps(students, soft_buckets, soft_probs.shape[1])
    if tail == "ghost":
        distance = ghost_kl(students, soft_probs, soft_tail)
    else:
        distance = renormalised_kl(students, soft_probs)
    taught = (soft_sources > 0).to(observed.dtype)
    likelihoods = torch.zeros_like(chunk_logps).index_add(0, chunk_of, observed[chunk_rows])
    texts = chunk_binary_kl(likelihoods, chunk_logps, tau=chunk_temperature) * chunk_weights
    parts = {
        "ce": Part(-observed, torch.ones_like(observed)),
        "distance": Part(torch.where(soft_sources > 0, distance, 0.0), taught),
        "chunk": Part(*(_put(x, chunk_starts, observed) for x in (texts, chunk_weights))),
    }
    lessons = parts["distance"].values + chunk_weight * parts["chunk"].values
    losses = (1 - (1 - lm_weight) * taught) * -observed + (1 - lm_weight) * lessons
    return TokenLosses(losses, parts)


def _put(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Add values `[C]` at their places, to zeros `[K]`."""
    return torch.zeros_like(like).index_add(0, places, values)


def top_values(
    logprobs: Tensor,
    top_values: Tensor,
    *,
    uld_weight: Annotated[
        float, Option("weight of the distance to the sources, beside CE", range="[0, inf)")
    ] = 1.5,
    uld_temperature: Annotated[
        float, Option("of both sides' softmax over the top k", range="(0, inf)")
    ] = 1.0,
    standardisation: Annotated[
        str,
        Option("of both sides' top k before that softmax", choices=("unbiased", "biased", "none")),
    ] = "unbiased",
) -> TokenLosses:
    """`CE + w mean over sources of the distance of sorted top-k distributions`: InfiFusion.

    The mean is over the sources that have comparable values at a token; where none has, CE alone.

    Args:
        logprobs: `[K, 1 + k]`, at last the policy's own k most probable ids, falling.
        top_values: `[K, M, k]`, the sources' own; NaN where one has none.
        uld_weight, uld_temperature, standardisation: see the options. None of the three is
            published.
    """
    observed, own = logprobs[:, 0], logprobs[:, 1:]
    there = ~top_values.isnan().any(dim=-1)
    flat = torch.where(there[..., None], top_values, own.detach()[:, None]).flatten(0, 1)
    students = own[:, None].expand_as(top_values).flatten(0, 1)
    if standardisation == "none":
        found = topk_l1(students, flat, temperature=uld_temperature)
    else:
        unbiased = standardisation == "unbiased"
        found = topk_standardised_l1(students, flat, temperature=uld_temperature, unbiased=unbiased)
    count = there.sum(dim=1)
    distance = torch.where(there, found.view_as(there), 0.0).sum(dim=1) / count.clamp_min(1)
    parts = {
        "ce": Part(-observed, torch.ones_like(observed)),
        "distance": Part(distance, (count > 0).to(observed.dtype)),
    }
    return TokenLosses(-observed + uld_weight * distance, parts)


def _idle_in_soft_targets(lm_weight: float, chunk_weight: float, **_: Any) -> dict[str, str]:
    if lm_weight == 1:
        alone = "with --lm-weight 1, which is cross-entropy alone"
        return dict.fromkeys(("tail", "chunk_weight", "chunk_temperature"), alone)
    return {} if chunk_weight else {"chunk_temperature": "with --chunk-weight 0"}


def _idle_in_top_values(uld_weight: float, **_: Any) -> dict[str, str]:
    names = () if uld_weight else ("uld_temperature", "standardisation")
    return dict.fromkeys(names, "with --uld-weight 0, which is cross-entropy alone")


@dataclass(frozen=True)
class TokenLoss:
    """A loss of single tokens, and what it needs beside the options that its signature declares.

    Attributes:
        function: `(logprobs [K, 1 + k], ..., *, options)` to `TokenLosses`. What else it takes is a
            value of the row by that name; one with a default is given where the row has it.
        most_sources: it learns from so many sources at a time, beside the initial pivot; None: any
            number.
        idle: its options to those that then have no effect, and why.
    """

    function: Callable[..., TokenLosses]
    most_sources: int | None = None
    idle: Callable[..., dict[str, str]] = lambda **options: {}

    @property
    def options(self) -> Mapping[str, Option]:
        """Its options."""
        return declared(self.function)

    @property
    def reads(self) -> Mapping[str, bool]:
        """Values of the row that it takes beside log-probs, and whether it needs them."""
        return values_read(self.function, 1)


TOKEN_LOSSES: dict[str, TokenLoss] = {
    "sft": TokenLoss(cross_entropy),
    "fusellm": TokenLoss(soft_targets, idle=_idle_in_soft_targets),
    "fusechat": TokenLoss(soft_targets, most_sources=1, idle=_idle_in_soft_targets),
    "infifusion": TokenLoss(top_values, idle=_idle_in_top_values),
}
