"""Train a pivot by preference optimization, through Megatron's own training loop.

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
import functools
import shutil
from pathlib import Path

from megatron_infifpo import cpu
from megatron_infifpo.cli import UserError, run

cpu.enable()

from megatron.core import mpu  # noqa: E402  (after the CPU stand-ins)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.training import get_args, pretrain, print_rank_0  # noqa: E402
from megatron.training.argument_utils import (  # noqa: E402
    ArgumentGroupFactory,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_args  # noqa: E402
from megatron.training.global_vars import set_global_variables  # noqa: E402

from megatron_infifpo.arguments import (  # noqa: E402
    Method,
    PreferenceConfig,
    escape_help,
    override,
    refuse_unsupported,
    resolve_method,
)
from megatron_infifpo.data.batching import (  # noqa: E402
    EvaluationLoader,
    PreferenceLoader,
    evaluation_steps,
)
from megatron_infifpo.data.preference_dataset import PreferenceDataset  # noqa: E402
from megatron_infifpo.data.sources import read_sources  # noqa: E402
from megatron_infifpo.models.architecture import apply_architecture  # noqa: E402
from megatron_infifpo.models.gpt import fixed_arguments, model_config, validate  # noqa: E402
from megatron_infifpo.training.reference_check import check_initial_weights  # noqa: E402
from megatron_infifpo.training.step import PreferenceStep  # noqa: E402
from megatron_infifpo.training.torch_adam import make_resumable  # noqa: E402


def parse_arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    """Parse Megatron's flags and ours; nothing is checked yet."""
    parsers: list[argparse.ArgumentParser] = []

    def add_ours(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        parser.description = __doc__
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        ArgumentGroupFactory(PreferenceConfig).build_group(parser, "preference optimization")
        escape_help(parser)
        parsers.append(parser)
        return parser

    return parse_args(add_ours), parsers[0]


def pivot_directory(args: argparse.Namespace) -> Path:
    """Return the checkpoint that carries the pivot's architecture: the run's own once it exists."""
    args.load = args.load or args.save
    candidates = [Path(d) for d in (args.load, args.pretrained_checkpoint) if d is not None]
    if not candidates:
        raise UserError("no pivot: give --pretrained-checkpoint DIR, a converted checkpoint")
    for directory in candidates:
        if (directory / "latest_checkpointed_iteration.txt").is_file():
            return directory
    raise UserError(
        f"no checkpoint in {' or '.join(map(str, candidates))}: convert the pivot with "
        "tools/convert_checkpoint.py import and give its directory to --pretrained-checkpoint"
    )


def open_dataset(prefix: str, sources: str | None, args: argparse.Namespace) -> PreferenceDataset:
    """Join a token dataset with its log-prob datasets."""
    if sources is None:
        raise UserError(f"--method {args.method} needs --preference-sources sources.yaml")
    return PreferenceDataset(prefix, read_sources(sources), require_sources=args.fused)


def set_schedule(
    args: argparse.Namespace, train: PreferenceDataset, valid: PreferenceDataset | None
) -> None:
    """Set the length of training and of validation from the data, where no flag does."""
    if args.global_batch_size is None or args.micro_batch_size is None:
        raise UserError("give --global-batch-size and --micro-batch-size, in pairs")
    if args.seq_length is None:
        args.seq_length = min(4096, args.max_position_embeddings)
    usable = len(train.require_eligible(args.seq_length))
    if args.train_iters is None and args.train_samples is None:
        args.train_iters = max(1, usable * args.preference_epochs // args.global_batch_size)
    if args.eval_interval is None:
        # Only at the end, where Megatron evaluates in any case.
        args.eval_interval = (args.train_iters or args.train_samples) + 1
    replica = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % replica:
        raise UserError(
            f"{args.world_size} ranks cannot be split into tensor x pipeline parallel groups of "
            f"{args.tensor_model_parallel_size} x {args.pipeline_model_parallel_size}"
        )
    pairs_at_once = args.micro_batch_size * (args.world_size // replica)
    if args.global_batch_size % pairs_at_once:
        raise UserError(
            f"--global-batch-size is {args.global_batch_size}, expected a multiple of "
            f"{pairs_at_once}: --micro-batch-size {args.micro_batch_size} x "
            f"{args.world_size // replica} data-parallel ranks"
        )
    if valid is None:
        args.eval_iters = 0
    else:
        args.eval_iters = evaluation_steps(
            len(valid.eligible(args.seq_length)),
            args.global_batch_size,
            args.global_batch_size // args.micro_batch_size,
        )


def datasets_provider(
    train: PreferenceDataset,
    valid: PreferenceDataset | None,
    samples: list[int],
    vp_stage: int | None = None,
):
    """Return this data-parallel rank's loaders; one call for each virtual pipeline stage."""
    args = get_args()
    layout = {
        "global_batch_size": args.global_batch_size,
        "data_parallel_rank": mpu.get_data_parallel_rank(),
        "data_parallel_size": mpu.get_data_parallel_world_size(),
        "num_microbatches": get_num_microbatches(),
        "max_tokens": args.seq_length,
        "pad_multiple": mpu.get_tensor_model_parallel_world_size(),
    }
    step, rest = divmod(args.consumed_train_samples, args.global_batch_size)
    if rest:
        raise UserError(
            f"--global-batch-size is {args.global_batch_size}, but the checkpoint has seen "
            f"{args.consumed_train_samples} pairs, which is no multiple of it: pairs would be "
            "repeated; resume with the batch size of before"
        )
    train_loader = PreferenceLoader(train, seed=args.seed, start_step=step, **layout)
    valid_loader = None if valid is None else EvaluationLoader(valid, **layout)
    return train_loader, valid_loader, None


def announce(args: argparse.Namespace, method: Method, train: PreferenceDataset) -> None:
    """Say what is about to be trained, on how much."""
    usable = len(train.eligible(args.seq_length))
    print_rank_0(f"preference optimization: {method}")
    print_rank_0(
        f"pairs: {usable} used, {len(train) - usable} left out (longer than --seq-length "
        f"{args.seq_length}, or without log-probs of the initial pivot); a step takes "
        f"{args.global_batch_size}, {args.train_iters} steps are "
        f"{(args.train_iters or 0) * args.global_batch_size / usable:.2f} epochs"
    )


def carry_architecture(pivot: Path, save: str | None) -> None:
    """Copy the Hugging Face configuration and tokenizer beside the run's checkpoints."""
    if save is None or (Path(save) / "hf").exists():
        return
    aside = Path(save) / ".hf.partial"
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(pivot / "hf", aside)
    aside.rename(Path(save) / "hf")


def main() -> None:
    """Check everything that can be checked, then hand over to Megatron."""
    args, parser = parse_arguments()
    refuse_unsupported(args, parser)
    method = resolve_method(args)
    args.fused = method.fused
    if args.preference_data is None:
        raise UserError("--preference-data is missing: the prefix of the pivot's token dataset")
    pivot = pivot_directory(args)
    apply_architecture(args, parser, pivot)
    train = open_dataset(args.preference_data, args.preference_sources, args)
    valid = None
    if args.preference_valid_data is not None:
        valid = open_dataset(args.preference_valid_data, args.preference_valid_sources, args)
    set_schedule(args, train, valid)
    override(args, parser, fixed_arguments() | {"dist_ckpt_optim_fully_reshardable": True})
    validate(args)
    check_initial_weights(args, pivot, train)
    config = model_config(args)
    set_global_variables(args, build_tokenizer=False)
    if args.rank == 0:
        carry_architecture(pivot, args.save)
    announce(args, method, train)
    make_resumable()
    provider = functools.partial(datasets_provider, train, valid)
    provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        pretrain_cfg_container_from_args(args, config),
        provider,
        ModelType.encoder_or_decoder,
        PreferenceStep(method, args.padded_vocab_size, train.source_names),
    )


if __name__ == "__main__":
    run(main)
