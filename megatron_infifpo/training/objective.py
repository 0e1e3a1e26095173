"""From a row's summed log-probs to references and losses; pure PyTorch, any layout, any device."""

from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.losses import CHOSEN, REJECTED, TOKEN_LOSSES, preference_loss
from megatron_infifpo.losses.lists import valid_mean
from megatron_infifpo.losses.tokens import TokenLosses
from megatron_infifpo.methods import Method
from megatron_infifpo.reference import FUSIONS, FusedReference, fuse_reference
from megatron_infifpo.references import reference as stored
from megatron_infifpo.rows import Row


def response_logps(method: Method, sum_logps: Tensor, token_counts: Tensor) -> Tensor:
    """Sums of log-probs as the method compares them: as they are, or as means over tokens."""
    # A response that is absent has no token, and a sum of 0.
    return sum_logps / token_counts.clamp_min(1) if method.length_normalization else sum_logps


def references(method: Method, row: Row, policy_logps: Tensor) -> FusedReference:
    """Reference log-probs of a row's responses: the initial pivot's, or fused from the sources.

    Args:
        method: the resolved method, not SFT.
        row: with the stored values of models, see `references.reference.collate`.
        policy_logps: `[B, R]` as `response_logps` gives them.

    Returns:
        Weights `[B, R, M]`, or `[B, R, M + 1]` with the initial pivot as the last source.
    """
    initial, sources, mask = stored.value(row, means=method.length_normalization)
    if not method.fused:
        return FusedReference(initial, torch.zeros_like(sources))
    if method.initial_as_source:
        sources = torch.cat([sources, initial.unsqueeze(-1)], dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    read = {name: row[name] for name in FUSIONS[method.fusion].reads if name in row}
    if method.standardised:
        read["source_scales"] = row["source_scales"]
    for name in {"source_weights", "source_scales"} & read.keys():  # the initial pivot's is last
        read[name] = read[name][:, : sources.shape[-1]]
    return fuse_reference(
        sources,
        initial,
        policy_logps,
        _preferred(method, row),
        fusion=method.fusion,
        clip=method.clip,
        source_mask=mask,
        valid=row.get("valid"),
        **read,
        **method.value_options,
        **method.fusion_options,
    )


def _preferred(method: Method, row: Row) -> Tensor:
    """Which responses clipping takes for the better ones, bool `[R]` or `[B, R]`."""
    if method.responses is None and "rewards" in method.reads:
        # In float64 equal rewards are their mean, and none is above it.
        rewards = row["rewards"].double()
        return rewards > valid_mean(rewards, row["valid"])
    counts = row["token_counts"]
    return torch.arange(counts.shape[1], device=counts.device) != REJECTED


def loss_arguments(method: Method, row: Row, progress: float = 1.0) -> dict[str, Any]:
    """What the method's loss takes beside log-probs: beta, its options, and values of the row."""
    read = {name: row[name] for name in method.reads if name in row}
    return {"beta": method.beta, **method.loss_options(progress), **read}


def pair_losses(
    method: Method, row: Row, sum_logps: Tensor, *, progress: float = 1.0
) -> tuple[Tensor, Tensor, FusedReference]:
    """Losses of a row's records, pairs or lists.

    Args:
        method: the resolved method, not SFT.
        row: see `references`.
        sum_logps: `[B, R]`, the policy's summed log-probs, with gradient.
        progress: share of training that is done, for options that grow over it.

    Returns:
        Losses `[B]`, the policy's log-probs `[B, R]` as the method compares them, and the
        references.
    """
    policy = response_logps(method, sum_logps, row["token_counts"])
    reference = references(method, row, policy)
    arguments = loss_arguments(method, row, progress)
    losses = preference_loss(method.objective, policy, reference.logps, **arguments)
    if method.sft_weight is not None:
        mean = sum_logps[:, CHOSEN] / row["token_counts"][:, CHOSEN]
        losses = losses - method.sft_weight * mean
    if method.pair_weights is not None:
        losses = losses * row["pair_weights"]
    return losses, policy, reference


def token_losses(method: Method, row: Row, logprobs: Tensor) -> TokenLosses:
    """Losses of a row's scored tokens, of one response a record.

    Held-out rows may lack soft targets: their tokens count by cross-entropy alone.

    Args:
        method: the resolved method, with a loss of tokens.
        row: the collated row.
        logprobs: `[K]`, or `[K, 1 + k]`, from the log-prob head, with gradient.
    """
    assert method.token_loss is not None
    columns = logprobs[:, None] if logprobs.dim() == 1 else logprobs
    read = {name: row[name] for name in method.reads if name in row}
    if method.reads and not read:
        return TOKEN_LOSSES["sft"].function(columns)
    found = method.token_loss.function(columns, **read, **method.loss_options(1.0))
    if method.pair_weights is not None:
        found = found._replace(losses=found.losses * row["pair_weights"][row["segment_ids"]])
    return found
