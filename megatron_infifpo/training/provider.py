"""Hand a run's rows to Megatron, once the loaded model has passed its checks."""

from collections.abc import Callable, Sequence

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu
from megatron_infifpo.rows.loaders import EvaluationLoader, PreferenceLoader
from megatron_infifpo.training.data import Datasets
from megatron_infifpo.training.megatron_args import pairs_seen
from megatron_infifpo.training.settings import Run


class DatasetsProvider:
    """What Megatron calls for data, once the checkpoint is loaded: one call a chunk of the model.

    The first call checks that the loaded model gives the initial pivot's log-probs.
    """

    is_distributed = True

    def __init__(
        self,
        run: Run,
        datasets: Datasets,
        check_models: Callable[[Sequence[torch.nn.Module]], None],
        on_accepted: Callable[[], None],
    ):
        """Take the run and its data, a check of the loaded model, and what to do once it passed."""
        self.run, self.datasets = run, datasets
        self.check_models, self.on_accepted = check_models, on_accepted
        self.unchecked: list[torch.nn.Module] = []

    def keep_models(self, models: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook of Megatron's model builder: remember this rank's chunks."""
        self.unchecked = models
        return models

    def __call__(
        self, samples: list[int], vp_stage: int | None = None
    ) -> tuple[PreferenceLoader, EvaluationLoader | None, None]:
        """Return this data-parallel rank's loaders."""
        if self.unchecked:
            self.check_models(self.unchecked)
            self.unchecked = []
            self.on_accepted()
        batch, seen = self.run.batch, pairs_seen()
        layout = {
            "global_batch_size": batch.pairs,
            "data_parallel_rank": mpu.get_data_parallel_rank(),
            "data_parallel_size": mpu.get_data_parallel_world_size(),
            "context_rank": mpu.get_context_parallel_rank(),
            "num_microbatches": get_num_microbatches(),
            "max_tokens": batch.max_tokens,
            "pin_memory": not cpu.is_enabled(),
            "layout": batch.rows,
        }
        step, rest = divmod(seen, batch.pairs)
        if rest:
            raise UserError(
                f"--global-batch-size is {batch.pairs}, but the checkpoint has seen {seen} pairs, "
                "which is no multiple of it: pairs would be repeated; resume with the batch size "
                "of before"
            )
        train, valid = self.datasets.train, self.datasets.valid
        for data in (train, valid):
            if data is not None:
                data.hands_out_targets = mpu.is_pipeline_last_stage()
        # A round's stream begins with the round: its steps take a permutation of its pairs whole,
        # however many there were before.
        own = step - self.datasets.since
        train_loader = PreferenceLoader(train, seed=batch.seed, start_step=own, **layout)
        valid_loader = None if valid is None else EvaluationLoader(valid, **layout)
        return train_loader, valid_loader, None
