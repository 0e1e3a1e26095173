"""Forward step and loss of training, as Megatron's schedules call them."""

from collections.abc import Iterator
from functools import partial

import torch
from megatron.training import get_args
from torch import Tensor

from megatron_infifpo.data import Row
from megatron_infifpo.logprobs import segment_sums
from megatron_infifpo.losses import CHOSEN
from megatron_infifpo.methods import Method
from megatron_infifpo.models.packed import run_packed, to_device
from megatron_infifpo.training.metrics import preference_metrics, sft_metrics, waste_metrics
from megatron_infifpo.training.objective import pair_losses

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


def progress() -> float:
    """Share of training that is done, in [0, 1]; counted in samples, so resume continues it."""
    args = get_args()
    total = args.train_samples or args.train_iters * args.global_batch_size
    return min(1.0, args.consumed_train_samples / total)


class TrainingStep:
    """Megatron's `forward_step`: one packed row through the model, then the loss over it.

    Losses are sums with a count: Megatron divides the summed gradients by the global count, so the
    mean is exact under any packing, pipeline and data parallelism.
    """

    def __init__(
        self,
        method: Method,
        vocab_size: int,
        source_names: tuple[str, ...],
        domains: tuple[str, ...],
    ):
        """Take the resolved method, the real vocabulary size, and names for the metrics."""
        self.method = method
        self.vocab_size = vocab_size
        self.source_names = source_names + (("initial",) if method.initial_as_source else ())
        self.domains = domains
        self.loss = self.sft_loss if method.objective == "sft" else self.preference_loss

    def __call__(
        self, data_iterator: Iterator[Row], model: torch.nn.Module
    ) -> tuple[Tensor, partial[Loss]]:
        """Return the stage's output and the function that turns the last stage's into the loss."""
        row = to_device(next(data_iterator))
        return run_packed(model, row, self.vocab_size), partial(self.loss, row)

    def preference_loss(self, row: Row, token_logprobs: Tensor) -> Loss:
        """Sum the losses of a row's pairs.

        Args:
            row: the collated row.
            token_logprobs: `[K]` from the log-prob head.

        Returns:
            Sum of the losses, int32 number of pairs, and `[sum, count]` of each metric.
        """
        counts = row["token_counts"]
        sums = segment_sums(token_logprobs, row["segment_ids"], counts.numel()).view_as(counts)
        done = progress()
        losses, policy, reference = pair_losses(self.method, row, sums, progress=done)
        with torch.no_grad():
            metrics = preference_metrics(
                self.method, row, policy, reference, losses, self.source_names, self.domains
            )
        metrics |= waste_metrics(row)
        if self.method.alpha is not None:
            alpha = self.method.loss_options(done)["alpha"]
            metrics["alpha"] = losses.new_tensor([alpha * len(losses), len(losses)])
        return losses.sum(), _count(len(losses), losses), metrics

    def sft_loss(self, row: Row, token_logprobs: Tensor) -> Loss:
        """Sum the cross-entropy of a row's chosen responses; the count is of tokens."""
        counts = row["token_counts"][:, CHOSEN]
        with torch.no_grad():
            sums = segment_sums(token_logprobs, row["segment_ids"], len(counts))
            metrics = sft_metrics(row, sums, counts, self.domains) | waste_metrics(row)
        return -token_logprobs.sum(), _count(len(token_logprobs), token_logprobs), metrics


def _count(number: int, like: Tensor) -> Tensor:
    return torch.tensor(number, dtype=torch.int, device=like.device)
