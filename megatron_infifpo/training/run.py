"""Train a pivot by preference optimization or SFT, through Megatron's own training loop."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from megatron_infifpo.training.config import RunConfig  # isort: skip  (readies Megatron for the CPU)

from megatron.core.enums import ModelType
from megatron.training import pretrain, print_rank_0
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.global_vars import set_global_variables

from megatron_infifpo.engine.adapters import train_adapters
from megatron_infifpo.engine.gpt import model_config, refusals
from megatron_infifpo.engine.parallel import one_rank_by_default
from megatron_infifpo.patches import learning_rate, training_loop
from megatron_infifpo.patches.apply import apply_patches
from megatron_infifpo.patches.signals import shield_helpers
from megatron_infifpo.storage.checksums import write_checksums
from megatron_infifpo.training.data import (
    NOT_SAVED,
    Datasets,
    describe,
    describe_sources,
    open_datasets,
)
from megatron_infifpo.training.experts import balances
from megatron_infifpo.training.export import check_export, export_finished, exported_at_end
from megatron_infifpo.training.failures import explained
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.identity import identity
from megatron_infifpo.training.lock import RunLock
from megatron_infifpo.training.lora import lora_of
from megatron_infifpo.training.megatron_args import (
    layers_of,
    megatron_args,
    recomputes_attention,
    rows_of,
)
from megatron_infifpo.training.provenance import describe_run, record_run, round_began
from megatron_infifpo.training.provider import DatasetsProvider
from megatron_infifpo.training.rates import check_rates
from megatron_infifpo.training.reference_check import check_initial_logprobs
from megatron_infifpo.training.resharding import check_optimizer_state
from megatron_infifpo.training.resume import check_batch, nothing_left, schedule_changes
from megatron_infifpo.training.sampler_check import check_samples, read_samples
from megatron_infifpo.training.schedule import training_schedule
from megatron_infifpo.training.settings import Run
from megatron_infifpo.training.start import Start, find_start
from megatron_infifpo.training.step import TrainingStep, losses_of
from megatron_infifpo.training.token_check import check_tokens
from megatron_infifpo.training.weights_check import begin_weights_check


def train(config: RunConfig) -> None:
    """Check everything that can be checked, then train through Megatron's loop.

    One rank of several where torchrun or srun started it, else alone; once in the life of a
    process, since Megatron's state is global.

    Args:
        config: what to train. With `--save` the same configuration starts a run and resumes it.

    Raises:
        UserError: something that the user gave is wrong, at the start or in a step.
    """
    one_rank_by_default()
    start = find_start(Folders.read(config.flags), lora=config.lora_rank is not None)
    lora = lora_of(config, start)
    datasets, kind = open_datasets(config), layers_of(config)
    since = round_began(start, datasets.train, config.method)
    datasets = replace(datasets, since=since)
    check_batch(config.flags["global_batch_size"], start)
    args = megatron_args(config, start, datasets, kind)
    run = Run.read(config, vars(args), rows_of(config, kind), lora)
    check_optimizer_state(run.arguments, start)
    check_rates(run.schedule, start.step, warn=run.layout.rank == 0)
    with refusals():
        model = model_config(run.arguments, kind, lora)
    finished = nothing_left(run.schedule, start, config.stop_at)
    check_export(run, finished=finished is not None)
    accepted = accept_on_first_rank(run, start, datasets, finished=finished is not None)
    if finished and not run.conduct.skip_train:
        print_rank_0(finished, rank=run.layout.rank)
        export_finished(run)
        return
    checks = begin_checks(run, start, datasets)
    start.verify(run.layout.rank, run.layout.world_size)
    provider = DatasetsProvider(run, datasets, checks, accepted.record)
    model.pre_wrap_hooks.append(start.fill)
    if lora is not None:
        model.pre_wrap_hooks.append(partial(train_adapters, seed=run.batch.seed))
    model.post_wrap_hooks.append(provider.keep_models)
    set_global_variables(args, build_tokenizer=False)
    print_rank_0(introduction(run, start, datasets, accepted), rank=run.layout.rank)
    prepare_megatron(run, start)
    step = TrainingStep(run, datasets)
    with refusals():
        container = pretrain_cfg_container_from_args(args, model)
    with exported_at_end(run), explained(run.folders, step, start.repeats):
        pretrain(container, provider, ModelType.encoder_or_decoder, step)
    if run.folders.save is None:
        print_rank_0(NOT_SAVED)


class Accepted(NamedTuple):
    """What the first rank knows of a run that may start; other ranks have the defaults.

    Attributes:
        record: writes it down, once the loaded model has passed its checks.
        rounds: how many rounds it has had, with this one.
    """

    record: Callable[[], None] = lambda: None
    rounds: int = 1


def introduction(run: Run, start: Start, datasets: Datasets, accepted: Accepted) -> str:
    """Say what is trained, on how much, and what is not as it was before a resume."""
    method, targets = run.config.method, datasets.train.targets
    settings, kind = method.describe(), "preference optimization"
    if method.token_loss is not None:  # which has no reference, and nothing that is fused here
        settings = {name: method.loss_option(name) for name in method.loss_declares}
        settings, kind = {"objective": method.objective, **settings}, "supervised fine-tuning"
    said = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
    lines = [f"{kind}: Method({said})"]
    if targets is not None:
        names = ", ".join(targets.sources)
        lines.append(f"soft targets {targets.prefix}: --fusion {targets.fusion} of {names}")
    if run.lora is not None:
        lines.append(
            f"adapters of rank {run.lora.rank}, alpha {run.lora.alpha:g}, of "
            f"{', '.join(run.lora.targets)}, on the weights in {start.own}"
        )
    elif start.is_hf:
        lines.append(f"weights of the Hugging Face folder {start.folder}, in {run.precision.dtype}")
    if changes := schedule_changes(run.arguments, start):
        lines.append(f"from step {start.step + 1} on: {', '.join(changes)}")
    lines += describe_sources(run.config.method, datasets.train)
    lines.append(describe(run, datasets, start.step))
    if recomputes_attention(run.config):
        lines.append(
            "--recompute-granularity selective: attention is computed again in the backward pass, "
            "and a rank keeps its own keys and values alone"
        )
    if accepted.rounds > 1:
        lines.append(f"round {accepted.rounds} on these pairs began after step {datasets.since}")
    if run.config.stop_at is not None:
        lines.append(f"this run ends at step {run.config.stop_at}")
    return "\n".join(lines)


def prepare_megatron(run: Run, start: Start) -> None:
    """Mend Megatron's loop as this run needs it."""
    balanced = balances(run.arguments)
    count = partial(losses_of, run.config.method) if balanced else None
    apply_patches(training_schedule(count), write_checksums)
    if start.resumed and run.conduct.fresh_optimizer:
        learning_rate.start_schedule_at(start.samples)
    if run.folders.save is None:
        training_loop.save_nothing()
    if run.conduct.exit_signal is not None:
        shield_helpers(run.conduct.exit_signal)


def begin_checks(
    run: Run, start: Start, datasets: Datasets
) -> Callable[[Sequence[torch.nn.Module]], None]:
    """Begin to read the pivot's weights; return what checks the loaded model.

    Args:
        run: that is about to start.
        start: the checkpoint that it begins with.
        datasets: what it trains and validates on.

    Raises:
        UserError: the sampler's log-probs cannot be this model's.
    """
    samples, begins = read_samples(run), start.step == datasets.since
    check_weights = begin_weights_check(run, start, datasets.train, samples, begins=begins)

    def check(models: Sequence[torch.nn.Module]) -> None:
        check_weights()
        check_initial_logprobs(run, start, datasets.train, models)
        check_samples(run, start, samples, models, begins=begins)

    return check


def accept_on_first_rank(
    run: Run, start: Start, datasets: Datasets, *, finished: bool = False
) -> Accepted:
    """Make the checks that one rank can make for all.

    Raises:
        UserError: the data are not for this model, the run is not the one that is resumed, or
            another one is writing to the folder.
    """
    if run.layout.rank != 0:
        return Accepted()
    both = [data for data in (datasets.train, datasets.valid) if data is not None]
    mode = run.config.tokenizer_check
    check_tokens(start.folder, *both, vocabulary=run.vocab_size, mode=mode)
    content = describe_run(run, identity(run, datasets.train), start, finished=finished)
    accepted = Accepted(rounds=len(content["rounds"]))
    if run.folders.save is None:
        return accepted
    lock = RunLock(run.folders.save)
    lock.try_early()
    return accepted._replace(record=partial(record_run, run, content, start, lock))
