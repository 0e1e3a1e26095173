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
from functools import partial

from megatron_infifpo import cpu
from megatron_infifpo.cli import run, user_errors

with user_errors():
    cpu.enable()

from megatron.core.enums import ModelType  # noqa: E402  (after the CPU stand-ins)
from megatron.training import pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_args  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402

from megatron_infifpo import patches  # noqa: E402
from megatron_infifpo.arguments import (  # noqa: E402
    add_training_flags,
    escape_help,
    override,
    refuse_unsupported,
    set_share_prompt,
)
from megatron_infifpo.checkpoint.layout import find_checkpoint  # noqa: E402
from megatron_infifpo.checkpoint.older import accept_older  # noqa: E402
from megatron_infifpo.checkpoint.torch_dist import TorchDistCheckpoint  # noqa: E402
from megatron_infifpo.methods import method_from_args  # noqa: E402
from megatron_infifpo.models.architecture import (  # noqa: E402
    apply_architecture,
    pivot_directory,
)
from megatron_infifpo.models.gpt import (  # noqa: E402
    fixed_arguments,
    model_config,
    refusals,
    validate,
)
from megatron_infifpo.models.layer_kind import choose_kind  # noqa: E402
from megatron_infifpo.models.parallel import one_rank_by_default  # noqa: E402
from megatron_infifpo.training.data import (  # noqa: E402
    DatasetsProvider,
    describe,
    open_datasets,
    set_schedule,
)
from megatron_infifpo.training.failures import explained  # noqa: E402
from megatron_infifpo.training.provenance import describe_run, identity, record_run  # noqa: E402
from megatron_infifpo.training.reference_check import begin_weights_check  # noqa: E402
from megatron_infifpo.training.resharding import check_optimizer_state  # noqa: E402
from megatron_infifpo.training.schedule import get_training_schedule  # noqa: E402
from megatron_infifpo.training.signals import shield_helpers  # noqa: E402
from megatron_infifpo.training.step import TrainingStep  # noqa: E402


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
    method = method_from_args(args)
    args.load = args.load or args.save
    pivot = pivot_directory(args.load, args.pretrained_checkpoint)
    checkpoint = TorchDistCheckpoint(find_checkpoint(pivot))  # before PyTorch unpickles it
    apply_architecture(args, parser, pivot)
    train, valid = open_datasets(args, method)
    kind = choose_kind(args)
    args.layer_kind = kind.name
    override(args, parser, fixed_arguments(kind))
    set_share_prompt(args, method)
    set_schedule(args, method, train, valid)
    validate(args)
    check_optimizer_state(args)
    check_weights = begin_weights_check(args, pivot, train)
    with refusals():
        config = model_config(args)
    now = describe_run(args, identity(args, method, train), pivot) if args.rank == 0 else None
    record = partial(record_run, args.save, now, pivot)
    provider = DatasetsProvider(train, valid, check_weights, record)
    config.pre_wrap_hooks.append(partial(accept_older, checkpoint))
    config.post_wrap_hooks.append(provider.keep_models)
    set_global_variables(args, build_tokenizer=False)
    print_rank_0(f"preference optimization: {method}")
    print_rank_0(describe(args, train))
    patches.apply(get_training_schedule)
    if args.exit_signal_handler:
        shield_helpers(args.exit_signal)
    step = TrainingStep(method, args.padded_vocab_size, train, valid)
    with refusals():
        container = pretrain_cfg_container_from_args(args, config)
    with explained(args, step):
        pretrain(container, provider, ModelType.encoder_or_decoder, step)


if __name__ == "__main__":
    run(main)
