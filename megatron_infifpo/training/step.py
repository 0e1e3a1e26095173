"""Forward step and loss of training, as Megatron's schedules call them."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from torch import Tensor

from megatron_infifpo.engine.packed import run_packed, to_device
from megatron_infifpo.errors import UserError
from megatron_infifpo.logprobs import segment_sums
from megatron_infifpo.methods import Method
from megatron_infifpo.rows import Row
from megatron_infifpo.storage.checkpoints import TRACKER
from megatron_infifpo.training.data import Datasets
from megatron_infifpo.training.megatron_args import current_step, pairs_seen
from megatron_infifpo.training.metrics import preference_metrics, token_metrics, waste_metrics
from megatron_infifpo.training.objective import pair_losses, token_losses
from megatron_infifpo.training.settings import Run

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]


def way_on(save: str | None, now: int) -> str:
    """Say how training can go on after a step that gave NaN: before step `now`, and slower."""
    slower = "with a lower --lr, or without these records"
    saved = sorted(int(p.name[5:]) for p in Path(save).glob("iter_*")) if save else []
    # The weights of the newest may be what gives NaN.
    before = [str(step) for step in saved if step < now]
    if not before:
        return f"start again in another --save, {slower}"
    return (
        f"write the number of a checkpoint before that ({', '.join(before)}) into "
        f"{Path(str(save)) / TRACKER} and run the command again with a lower --lr and "
        f"--override-opt-param-scheduler; or start again in another --save, {slower}"
    )


class TrainingStep:
    """Megatron's `forward_step`: one packed row through the model, then the loss over it.

    Losses are sums with a count: Megatron divides the summed gradients by the global count, so the
    mean is exact under any packing, pipeline, data and context parallelism. Ranks that share a row
    each compute all of its losses, and one of them counts it.
    """

    def __init__(self, run: Run, datasets: Datasets):
        """Take the run, and its data, for names and ids."""
        self.run, self.method = run, run.config.method
        self.train, self.valid = datasets.train, datasets.valid
        self.recent: tuple[int | None, list[Tensor]] = (None, [])
        self.unchecked: list[tuple[Tensor, Tensor]] = []
        self.source_names = self.train.source_names
        if self.method.initial_as_source:
            self.source_names += ("initial",)
        if self.train.targets is not None:
            self.source_names = self.train.targets.sources
        self.domains = self.train.domains
        self.loss = self.preference_loss if self.method.token_loss is None else self.token_loss

    def __call__(
        self, data_iterator: Iterator[Row], model: torch.nn.Module
    ) -> tuple[Tensor, partial[Loss]]:
        """Return the stage's output and the function that turns the last stage's into the loss."""
        row = next(data_iterator)
        self.remember(row)
        # Records are named in messages only, and not on the device.
        row = to_device(row) | {"indices": row["indices"]}
        return run_packed(model, row, self.run.vocab_size), partial(self.loss, row)

    def remember(self, row: Row) -> None:
        """Keep the records of the step at hand, for messages."""
        if not torch.is_grad_enabled():
            return  # evaluation
        now = current_step()
        kept = self.recent[1] if self.recent[0] == now else []
        self.recent = (now, kept + [row["indices"]])

    def record_ids(self) -> list[str]:
        """Ids of the training records that this rank has seen in the step at hand."""
        return [self.train.tokens.ids(i) for part in self.recent[1] for i in part.tolist()]

    def preference_loss(self, row: Row, token_logprobs: Tensor) -> Loss:
        """Sum the losses of a row's pairs, or lists.

        Args:
            row: the collated row.
            token_logprobs: `[K]` from the log-prob head.

        Returns:
            Sum of the losses, int32 number of pairs, and `[sum, count]` of each metric.
        """
        counts = row["token_counts"]
        sums = segment_sums(token_logprobs, row["segment_ids"], counts.numel()).view_as(counts)
        self.check(row, sums)
        # Counted in pairs, so that a resumed run continues it.
        done = min(1.0, pairs_seen() / self.run.schedule.total)
        losses, policy, reference = pair_losses(self.method, row, sums, progress=done)
        with torch.no_grad():
            metrics = preference_metrics(
                self.method, row, policy, reference, losses, self.source_names, self.domains
            )
        metrics |= waste_metrics(row)
        options = self.method.loss_options(done)
        for name in self.method.growing:
            metrics[name] = losses.new_full((2,), float(len(losses)))
            metrics[name][0] *= options[name]
        return losses.sum(), self.count(row, losses), metrics

    def check(self, row: Row, sums: Tensor) -> None:
        """Refuse log-probs that no optimizer should see: sums `[B, R]`, 0 where one is absent.

        Looked at once a step, in its last row, since each look waits for the GPU.

        Raises:
            UserError: NaN or infinite; names the records.
        """
        if not self.run.conduct.check_for_nan:
            return
        bad = ~torch.isfinite(sums.detach()).all(dim=1)
        self.unchecked.append((row["indices"], bad))
        if not row["ends_step"]:
            return
        indices, flags = (torch.cat(parts) for parts in zip(*self.unchecked, strict=True))
        self.unchecked = []
        found = indices[flags.cpu()].tolist()
        if found:
            data = self.train if torch.is_grad_enabled() or self.valid is None else self.valid
            ids = [data.tokens.ids(i) for i in dict.fromkeys(found)]
            now = current_step() or 0
            raise UserError(
                f"the pivot's log-probs of the records {', '.join(map(repr, ids))} in "
                f"{data.tokens.prefix} are NaN or infinite at step {now}: "
                f"look at the gradient norms before; {way_on(self.run.folders.save, now)}"
            )

    def token_loss(self, row: Row, logprobs: Tensor) -> Loss:
        """Sum the losses of the tokens of a row's chosen responses; the count is of tokens.

        Args:
            row: the collated row.
            logprobs: `[K]`, or `[K, 1 + k]`, from the log-prob head.
        """
        records = len(row["token_counts"])
        found = token_losses(self.method, row, logprobs)
        with torch.no_grad():
            observed = logprobs if logprobs.dim() == 1 else logprobs[:, 0]
            sums = segment_sums(observed, row["segment_ids"], records)
            metrics = token_metrics(row, found, sums, self.source_names, self.domains)
        self.check(row, sums[:, None])
        return found.losses.sum(), self.count(row, found.losses), metrics | waste_metrics(row)

    def count(self, row: Row, losses: Tensor) -> Tensor:
        """Return the number of a row's losses, int32 on their device; 0 where another counts."""
        return losses.new_full((), losses_of(self.method, row), dtype=torch.int)


def losses_of(method: Method, row: Row) -> int:
    """How many losses a row has: of its records, or of their tokens; 0 where another rank counts.

    Ranks that share a row compute the same ones.
    """
    counts = "scored_places" not in row or mpu.get_context_parallel_rank() == 0
    every = row["token_counts"] if method.token_loss is None else row["target_ids"]
    return len(every) if counts else 0
