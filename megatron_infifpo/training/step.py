"""Forward step and loss of preference training, as Megatron's schedules call them."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from megatron_infifpo.arguments import Method
from megatron_infifpo.logprobs import segment_sums
from megatron_infifpo.losses import CHOSEN, PIVOT_CHOSEN, preference_loss
from megatron_infifpo.models.packed import Row, run_packed, to_device
from megatron_infifpo.reference import FusedReference, fuse_reference
from megatron_infifpo.training.metrics import report


def references(method: Method, row: Row, policy_logps: Tensor) -> FusedReference:
    """Reference log-probs of a row's responses: the initial pivot's, or fused from the sources."""
    initial, sources = row["initial_sum_logps"], row["source_sum_logps"]
    if method.length_normalization:
        initial = initial / row["token_counts"]
        sources = sources / row["source_token_counts"]
    mask = row["source_mask"]
    if not method.fused:
        return FusedReference(initial, torch.zeros_like(sources))
    if method.initial_as_source:
        sources = torch.cat([sources, initial.unsqueeze(-1)], dim=-1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
    preferred = torch.zeros(initial.shape[1], dtype=torch.bool, device=initial.device)
    preferred[CHOSEN] = True
    preferred[PIVOT_CHOSEN:] = True
    return fuse_reference(
        sources,
        initial,
        policy_logps,
        preferred,
        fusion=method.fusion,
        clip=method.clip,
        source_mask=mask,
        margin_space=method.margin_space,
        margin_anchor=method.margin_anchor,
        selection=method.selection,
    )


class PreferenceStep:
    """Megatron's `forward_step`: one packed row through the model, then the loss over its pairs."""

    def __init__(self, method: Method, vocab_size: int, source_names: tuple[str, ...]):
        """Take the resolved method, the real vocabulary size and the sources' names."""
        self.method = method
        self.vocab_size = vocab_size
        self.source_names = source_names + (("initial",) if method.initial_as_source else ())

    def __call__(
        self, data_iterator: Iterator[Row], model: torch.nn.Module
    ) -> tuple[Tensor, partial]:
        """Return the stage's output and the function that turns the last stage's into the loss."""
        row = to_device(next(data_iterator))
        return run_packed(model, row, self.vocab_size), partial(self.loss, row)

    def loss(self, row: Row, token_logprobs: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Sum the losses of a row's pairs.

        Megatron divides the summed gradients by the global count of pairs, so the mean over pairs
        is exact under any packing, pipeline and data parallelism.

        Args:
            row: the collated row.
            token_logprobs: `[K]` from the log-prob head.

        Returns:
            Sum of the losses, int32 number of pairs, and `[sum, count]` of each metric.
        """
        counts = row["token_counts"]
        sums = segment_sums(token_logprobs, row["segment_ids"], counts.numel()).view_as(counts)
        policy = sums / counts if self.method.length_normalization else sums
        reference = references(self.method, row, policy)
        losses = preference_loss(
            self.method.objective, policy, reference.logps, beta=self.method.beta
        )
        with torch.no_grad():
            metrics = report(self.method, row, policy, reference, losses, self.source_names)
        pairs = torch.tensor(len(losses), dtype=torch.int, device=losses.device)
        return losses.sum(), pairs, metrics
