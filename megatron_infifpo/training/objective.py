"""From a row's summed log-probs to references and losses; pure PyTorch, any layout, any device."""

import torch
from torch import Tensor

from megatron_infifpo.losses import CHOSEN, REJECTED, preference_loss
from megatron_infifpo.methods import Method
from megatron_infifpo.reference import FusedReference, fuse_reference
from megatron_infifpo.references import reference as stored
from megatron_infifpo.rows import Row


def response_logps(method: Method, sum_logps: Tensor, token_counts: Tensor) -> Tensor:
    """Sums of log-probs as the method compares them: as they are, or as means over tokens."""
    return sum_logps / token_counts if method.length_normalization else sum_logps


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
    preferred = torch.arange(initial.shape[1], device=initial.device) != REJECTED
    return fuse_reference(
        sources,
        initial,
        policy_logps,
        preferred,
        fusion=method.fusion,
        clip=method.clip,
        source_mask=mask,
        **method.fusion_options,
    )


def pair_losses(
    method: Method, row: Row, sum_logps: Tensor, *, progress: float = 1.0
) -> tuple[Tensor, Tensor, FusedReference]:
    """Losses of a row's pairs.

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
    options = method.loss_options(progress)
    options |= {name: row[name] for name in method.reads if name in row}
    losses = preference_loss(method.objective, policy, reference.logps, beta=method.beta, **options)
    if method.sft_weight is not None:
        mean = sum_logps[:, CHOSEN] / row["token_counts"][:, CHOSEN]
        losses = losses - method.sft_weight * mean
    return losses, policy, reference
