"""Train a pivot by preference optimization or SFT, through Megatron's own training loop.

Example, two ranks:

    torchrun --nproc-per-node 2 -m megatron_infifpo.train --method infifpo \
        --preference-data data/train --preference-sources data/sources.yaml \
        --pretrained-checkpoint pivot --save run --pipeline-model-parallel-size 2 \
        --micro-batch-size 2 --global-batch-size 128 --lr 1e-7 --bf16

Megatron's flags work as in Megatron; what cannot work with packed preference pairs is refused. The
architecture comes from the checkpoint. `--load` defaults to `--save`, so the same command starts a
run and resumes it.
"""

import argparse
from collections.abc import Callable
from functools import partial

from megatron_infifpo.errors import user_errors
from megatron_infifpo.patches import cpu

with user_errors():
    cpu.enable()

from megatron.core.enums import ModelType  # noqa: E402  (after the CPU stand-ins)
from megatron.training import pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402

from megatron_infifpo.engine.gpt import (  # noqa: E402
    fixed_arguments,
    model_config,
    refusals,
    validated,
)
from megatron_infifpo.engine.layer_kind import choose_kind  # noqa: E402
from megatron_infifpo.engine.parallel import one_rank_by_default  # noqa: E402
from megatron_infifpo.families.architecture import apply_architecture  # noqa: E402
from megatron_infifpo.methods import Method, method_from_options  # noqa: E402
from megatron_infifpo.patches import learning_rate, training_loop  # noqa: E402
from megatron_infifpo.patches.apply import apply_patches  # noqa: E402
from megatron_infifpo.patches.signals import shield_helpers  # noqa: E402
from megatron_infifpo.rows.preference_dataset import PreferenceDataset  # noqa: E402
from megatron_infifpo.storage.checksums import verify_share, write_checksums  # noqa: E402
from megatron_infifpo.storage.older import accept_older  # noqa: E402
from megatron_infifpo.training.arguments import (  # noqa: E402
    add_training_flags,
    escape_help,
    override,
    refuse_unsupported,
    set_share_prompt,
)
from megatron_infifpo.training.data import (  # noqa: E402
    NOT_SAVED,
    DatasetsProvider,
    describe,
    open_datasets,
    set_schedule,
)
from megatron_infifpo.training.failures import explained  # noqa: E402
from megatron_infifpo.training.lock import RunLock  # noqa: E402
from megatron_infifpo.training.provenance import describe_run, identity, record_run  # noqa: E402
from megatron_infifpo.training.rates import check_rates, complete_warm_up  # noqa: E402
from megatron_infifpo.training.reference_check import begin_weights_check  # noqa: E402
from megatron_infifpo.training.resharding import check_optimizer_state  # noqa: E402
from megatron_infifpo.training.resume import (  # noqa: E402
    check_batch,
    nothing_left,
    settle_schedule,
)
from megatron_infifpo.training.schedule import get_training_schedule  # noqa: E402
from megatron_infifpo.training.start import Start, find_start  # noqa: E402
from megatron_infifpo.training.step import TrainingStep  # noqa: E402
from megatron_infifpo.training.token_check import check_tokens  # noqa: E402


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Parse Megatron's flags and ours; nothing is checked yet."""
    parsers: list[argparse.ArgumentParser] = []

    def add_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.description = __doc__
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        add_training_flags(parser)
        escape_help(parser)
        parsers.append(parser)
        return parser

    return parse_args(add_ours), parsers[0]


def main() -> None:
    """Check everything that can be checked, then hand over to Megatron."""
    one_rank_by_default()
    args, parser = parse_arguments()
    refuse_unsupported(args, parser)
    method = method_from_options(args.method, vars(args))
    start = find_start(args)
    apply_architecture(args, parser, start.folder)
    train, valid = open_datasets(args, method)
    kind = choose_kind(
        half=args.bf16 or args.fp16,
        fp8=bool(args.fp8),
        transformer_impl=args.transformer_impl,
        te_attention=args.te_attention,
    )
    args.layer_kind = kind.name
    override(args, parser, fixed_arguments(kind))
    set_share_prompt(args, method)
    set_schedule(args, method, train, valid)
    args = validated(vars(args))
    news = check_resume(args, start, method)
    with refusals():
        config = model_config(vars(args), kind)
    record = accept_on_first_rank(args, start, method, train, valid)
    if finished := nothing_left(args, start):
        print_rank_0(finished, rank=args.rank)
        return
    verify_share(start.checkpoint.checksums, args.rank, args.world_size)
    provider = DatasetsProvider(train, valid, begin_weights_check(args, start, train), record)
    config.pre_wrap_hooks.append(partial(accept_older, start.checkpoint))
    config.post_wrap_hooks.append(provider.keep_models)
    set_global_variables(args, build_tokenizer=False)
    news = [f"preference optimization: {method}", *news, describe(args, train, start.step)]
    print_rank_0("\n".join(news), rank=args.rank)
    apply_patches(get_training_schedule, write_checksums)
    if start.resumed and args.no_load_optim:
        learning_rate.start_schedule_at(start.samples)
    if args.save is None:
        training_loop.save_nothing()
    if args.exit_signal_handler:
        shield_helpers(args.exit_signal)
    step = TrainingStep(method, args.padded_vocab_size, train, valid)
    with refusals():
        container = pretrain_cfg_container_from_args(args, config)
    with explained(args, step, start.repeats):
        pretrain(container, provider, ModelType.encoder_or_decoder, step)
    if args.save is None:
        print_rank_0(NOT_SAVED)


def check_resume(args: argparse.Namespace, start: Start, method: Method) -> list[str]:
    """Check that a run can go on from its checkpoint, and at which learning rates.

    Returns:
        What is not as it was, in words.

    Raises:
        UserError: it cannot, or not without being told how.
    """
    check_batch(args, start)
    news = settle_schedule(args, start, length_matters=bool(method.growing))
    check_optimizer_state(args, start)
    complete_warm_up(args)
    check_rates(args, start.step)
    return [f"from step {start.step + 1} on: {', '.join(news)}"] if news else []


def accept_on_first_rank(
    args: argparse.Namespace,
    start: Start,
    method: Method,
    train: PreferenceDataset,
    valid: PreferenceDataset | None,
) -> Callable[[], None]:
    """Make the checks that one rank can make for all; return what records the run at last.

    Raises:
        UserError: the data are not for this model, the run is not the one that is resumed, or
            another one is writing to the folder.
    """
    if args.rank != 0:
        return lambda: None
    check_tokens(args, start.folder, train, *([] if valid is None else [valid]))
    run = describe_run(args, identity(args, method, train), start)
    if args.save is None:
        return lambda: None
    lock = RunLock(args.save)
    lock.try_early()
    return partial(record_run, args.save, run, start.folder, lock)
