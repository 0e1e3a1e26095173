"""Metrics of a preference step, as `[sum, count]` so that Megatron averages them exactly."""

from typing import Any

import torch
from torch import Tensor

from megatron_infifpo.arguments import Method
from megatron_infifpo.losses import CHOSEN, REJECTED
from megatron_infifpo.reference import FusedReference


def report(
    method: Method,
    row: dict[str, Any],
    policy: Tensor,
    reference: FusedReference,
    losses: Tensor,
    source_names: tuple[str, ...],
) -> dict[str, Tensor]:
    """Metrics of one row.

    Args:
        method: the resolved method.
        row: the collated row.
        policy: `[B, R]` log-probs (means or sums, as the method has them).
        reference: the references used.
        losses: `[B]`.
        source_names: names of the M sources.

    Returns:
        float32 `[sum, count]` by name:
        loss; rewards/accuracy, rewards/margin, rewards/chosen, rewards/rejected with the reward
        `beta (policy - reference)`; logps/accuracy (the policy alone prefers the chosen response),
        logps/margin, logps/chosen, logps/rejected; and for a fused reference clip-rate (share of
        source values that clipping changed) and share/<source> (its weight in the reference).
    """

    def mean(values: Tensor) -> Tensor:
        values = values.float()
        return torch.stack([values.sum(), values.new_tensor(values.numel())])

    metrics = {"loss": mean(losses)}
    for name, scores in (
        ("rewards", method.beta * (policy - reference.logps)),
        ("logps", policy),
    ):
        chosen, rejected = scores[:, CHOSEN], scores[:, REJECTED]
        metrics[f"{name}/accuracy"] = mean(chosen > rejected)
        metrics[f"{name}/margin"] = mean(chosen - rejected)
        metrics[f"{name}/chosen"] = mean(chosen)
        metrics[f"{name}/rejected"] = mean(rejected)
    if not method.fused:
        return metrics
    if reference.clipped is not None:
        values = row["source_mask"].sum() * policy.shape[1]
        metrics["clip-rate"] = torch.stack([reference.clipped.sum(), values]).float()
    for index, name in enumerate(source_names):
        metrics[f"share/{name}"] = mean(reference.weights[..., index])
    return metrics
