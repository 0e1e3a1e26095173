"""What the parts of training need to know of a run, read off Megatron's arguments once."""

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Self

from megatron_infifpo.families.lora import Lora
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.training.config import RunConfig
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.rates import Schedule


@dataclass(frozen=True)
class Layout:
    """How a run lies on ranks: this one, how many there are, and what they split."""

    rank: int
    world_size: int
    tensor_parallel: int
    pipeline_parallel: int


@dataclass(frozen=True)
class Batch:
    """How pairs become rows.

    Attributes:
        pairs: of a step.
        micro: of a row, on average.
        max_tokens: longest response with its prompt.
        seed: of their order.
        rows: how pairs lie in them.
    """

    pairs: int
    micro: int
    max_tokens: int
    seed: int
    rows: RowLayout


@dataclass(frozen=True)
class Precision:
    """Data type of the weights, and whether products are in FP8."""

    dtype: str
    fp8: bool


@dataclass(frozen=True)
class Conduct:
    """What a run does beside its steps.

    Attributes:
        skip_train: it evaluates alone.
        fresh_optimizer: a checkpoint's optimizer state is not loaded.
        check_for_nan: of log-probs, before the optimizer sees them.
        exit_signal: at which it saves and ends, where there is one.
    """

    skip_train: bool
    fresh_optimizer: bool
    check_for_nan: bool
    exit_signal: signal.Signals | None


@dataclass(frozen=True)
class Run:
    """A run that is about to start.

    Attributes:
        config: as it was asked for.
        layout, batch, precision, schedule, folders, conduct: of it.
        save_interval: steps between checkpoints, where there are any.
        vocab_size: rows of the model's vocabulary, without padding.
        arguments: all of Megatron's, by name, read only: to build the model, and to compare with
            those of a checkpoint and of an earlier attempt.
        lora: the adapters that are trained in place of the whole model, if any.
    """

    config: RunConfig
    layout: Layout
    batch: Batch
    precision: Precision
    schedule: Schedule
    folders: Folders
    conduct: Conduct
    save_interval: int | None
    vocab_size: int
    arguments: Mapping[str, Any]
    lora: Lora | None = None

    @classmethod
    def read(
        cls,
        config: RunConfig,
        values: Mapping[str, Any],
        rows: RowLayout,
        lora: Lora | None = None,
    ) -> Self:
        """Read it off Megatron's validated arguments, by name."""
        return cls(
            config=config,
            layout=Layout(
                rank=values["rank"],
                world_size=values["world_size"],
                tensor_parallel=values["tensor_model_parallel_size"],
                pipeline_parallel=values["pipeline_model_parallel_size"],
            ),
            batch=Batch(
                pairs=values["global_batch_size"],
                micro=values["micro_batch_size"],
                max_tokens=values["seq_length"],
                seed=values["seed"],
                rows=rows,
            ),
            precision=Precision(
                dtype=str(values["params_dtype"]).removeprefix("torch."), fp8=bool(values["fp8"])
            ),
            schedule=Schedule.read(values),
            folders=Folders.read(values),
            conduct=Conduct(
                skip_train=values["skip_train"],
                fresh_optimizer=values["no_load_optim"],
                check_for_nan=values["check_for_nan_in_loss_and_grad"],
                exit_signal=values["exit_signal"] if values["exit_signal_handler"] else None,
            ),
            save_interval=values["save_interval"],
            vocab_size=values["padded_vocab_size"],
            arguments=MappingProxyType(dict(values)),
            lora=lora,
        )
