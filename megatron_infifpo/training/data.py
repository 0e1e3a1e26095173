"""Data of a training run: open it, derive the schedule from it, hand loaders to Megatron."""

import argparse
from collections.abc import Callable

import torch
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args

from megatron_infifpo.errors import UserError
from megatron_infifpo.methods import Method, flag
from megatron_infifpo.patches import cpu
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.loaders import EvaluationLoader, PreferenceLoader
from megatron_infifpo.rows.plan import evaluation_steps, fitting_micro_batch_size
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.storage.notes import counted
from megatron_infifpo.training.arguments import row_layout
from megatron_infifpo.training.reference_check import check_initial_logprobs

NOT_SAVED = "NOTHING IS SAVED, since there is no --save"


def open_datasets(
    args: argparse.Namespace, method: Method
) -> tuple[PreferenceDataset, PreferenceDataset | None]:
    """Open the training pairs and the held-out ones, if there are any.

    Raises:
        UserError: a flag is missing or has no effect, or a dataset does not fit.
    """
    if args.preference_data is None:
        raise UserError("--preference-data is missing: the prefix of the pivot's token dataset")
    valid = args.preference_valid_data
    useless, why = [], "without --preference-valid-data"
    if method.reference is None:
        useless = ["preference_sources", "preference_valid_sources"]
        useless += ["reference_check", "reference_probes", "reference_tolerance"]
        why = "with --method sft, which has no reference"
    elif valid is None:
        useless = ["preference_valid_sources"]
    for name in useless:
        if getattr(args, name) is not None:
            raise UserError(f"{flag(name)} has no effect {why}: leave it out")
    train = _open(args.preference_data, args.preference_sources, "--preference-sources", method)
    if valid is None:
        return train, None
    held_out = _open(valid, args.preference_valid_sources, "--preference-valid-sources", method)
    if held_out.source_names != train.source_names:
        found, expected = (", ".join(data.source_names) for data in (held_out, train))
        raise UserError(
            f"{args.preference_valid_sources} lists the sources {found}; expected those of "
            f"{args.preference_sources}, in the same order: {expected}"
        )
    # One list of names for the metrics of both.
    train.align_domains(held_out.domains)
    held_out.align_domains(train.domains)
    return train, held_out


def _open(prefix: str, sources: str | None, sources_flag: str, method: Method) -> PreferenceDataset:
    if method.reference is None:
        return PreferenceDataset(prefix, responses=method.responses)
    if sources is None:
        raise UserError(f"{sources_flag} is missing: sources.yaml names the log-probs of {prefix}")
    return PreferenceDataset(
        prefix,
        read_sources(sources),
        require_sources=method.fused,
        responses=method.responses,
    )


def set_schedule(
    args: argparse.Namespace,
    method: Method,
    train: PreferenceDataset,
    valid: PreferenceDataset | None,
) -> None:
    """Set the length of training and of validation from the data, where no flag does.

    Raises:
        UserError: a batch that cannot be laid out, or no pair that fits.
    """
    if (args.micro_batch_size is None) == (args.micro_batch_tokens is None):
        raise UserError("give one of --micro-batch-size (pairs) and --micro-batch-tokens")
    if args.global_batch_size is None:
        raise UserError("give --global-batch-size, in pairs")
    if args.seq_length is None:
        args.seq_length = min(4096, args.max_position_embeddings)
    usable = len(train.require_eligible(args.seq_length))
    epochs = args.preference_epochs
    if epochs is not None and epochs < 1:
        raise UserError(f"--preference-epochs is {epochs}, expected at least 1")
    if args.train_iters is None and args.train_samples is None:
        args.train_iters = max(1, usable * (epochs or 1) // args.global_batch_size)
    elif epochs is not None:
        other = "--train-iters" if args.train_samples is None else "--train-samples"
        raise UserError(f"--preference-epochs has no effect with {other}: give one of them")
    steps = args.train_iters or args.train_samples // args.global_batch_size
    if args.eval_interval is None:
        # Only at the end, where Megatron evaluates in any case.
        args.eval_interval = steps + 1
    if args.save is not None and args.save_interval is None:
        args.save_interval = max(1, steps)  # at the end
    replica = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    if args.world_size % replica:
        raise UserError(
            f"{args.world_size} ranks cannot be split into tensor x pipeline parallel groups of "
            f"{args.tensor_model_parallel_size} x {args.pipeline_model_parallel_size}"
        )
    _set_micro_batch(args, method, train, args.world_size // replica)
    if valid is None:
        args.eval_iters = 0
    else:
        args.eval_iters = evaluation_steps(
            len(valid.eligible(args.seq_length)),
            args.global_batch_size,
            args.global_batch_size // args.micro_batch_size,
        )


def _set_micro_batch(
    args: argparse.Namespace, method: Method, train: PreferenceDataset, ranks: int
) -> None:
    """Check the size of a micro-batch, or find it from a token budget, for so many DP ranks."""
    pairs_at_once = (args.micro_batch_size or 1) * ranks
    if args.global_batch_size % pairs_at_once:
        size = f"--micro-batch-size {args.micro_batch_size} x " if args.micro_batch_size else ""
        raise UserError(
            f"--global-batch-size is {args.global_batch_size}, expected a multiple of "
            f"{pairs_at_once}: {size}{ranks} data-parallel ranks"
        )
    if args.micro_batch_size is None:
        lengths = train.pair_lengths(row_layout(args))
        args.micro_batch_size = fitting_micro_batch_size(
            lengths[train.require_eligible(args.seq_length)],
            args.micro_batch_tokens,
            seed=args.seed,
            steps=args.train_iters or -(-args.train_samples // args.global_batch_size),
            global_batch_size=args.global_batch_size,
            data_parallel_size=ranks,
        )
    if method.several_pairs and args.micro_batch_size < 2:
        raise UserError(
            f"--objective {method.objective} compares the pairs of a row: with --micro-batch-size "
            "1 there is nothing to compare; give a larger one"
        )


def describe(args: argparse.Namespace, train: PreferenceDataset, done: int) -> str:
    """Say how much is about to be trained on, and what is saved; `done` steps are behind."""
    usable = len(train.eligible(args.seq_length))
    reasons = counted(train.left_out(args.seq_length))
    left_out = f" ({reasons})" if reasons else ""
    steps = args.train_iters or args.train_samples // args.global_batch_size
    epochs = steps * args.global_batch_size / usable
    saved = f"saved every {args.save_interval} steps and at the end" if args.save else NOT_SAVED
    return (
        f"pairs: {usable} used, {len(train) - usable} left out{left_out}; {steps} steps of "
        f"{args.global_batch_size} are {epochs:.2f} epochs, in micro-batches of "
        f"{args.micro_batch_size}{f'; {done} steps are done' if done else ''}; {saved}"
    )


class DatasetsProvider:
    """What Megatron calls for data, once the checkpoint is loaded: one call a chunk of the model.

    The first call checks that the loaded model gives the initial pivot's log-probs.
    """

    is_distributed = True

    def __init__(
        self,
        train: PreferenceDataset,
        valid: PreferenceDataset | None,
        check_weights: Callable[[], None],
        on_accepted: Callable[[], None],
    ):
        """Take the data, `begin_weights_check`'s end, and what to do once all checks passed."""
        self.train, self.valid = train, valid
        self.check_weights, self.on_accepted = check_weights, on_accepted
        self.unchecked: list[torch.nn.Module] = []

    def keep_models(self, models: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Hook of Megatron's model builder: remember this rank's chunks."""
        self.unchecked = models
        return models

    def __call__(
        self, samples: list[int], vp_stage: int | None = None
    ) -> tuple[PreferenceLoader, EvaluationLoader | None, None]:
        """Return this data-parallel rank's loaders."""
        args = get_args()
        if self.unchecked:
            self.check_weights()
            check_initial_logprobs(args, self.unchecked, self.train)
            self.unchecked = []
            self.on_accepted()
        layout = {
            "global_batch_size": args.global_batch_size,
            "data_parallel_rank": mpu.get_data_parallel_rank(),
            "data_parallel_size": mpu.get_data_parallel_world_size(),
            "num_microbatches": get_num_microbatches(),
            "max_tokens": args.seq_length,
            "layout": row_layout(args),
            "pin_memory": not cpu.is_enabled(),
        }
        step, rest = divmod(args.consumed_train_samples, args.global_batch_size)
        if rest:
            raise UserError(
                f"--global-batch-size is {args.global_batch_size}, but the checkpoint has seen "
                f"{args.consumed_train_samples} pairs, which is no multiple of it: pairs would be "
                "repeated; resume with the batch size of before"
            )
        train_loader = PreferenceLoader(self.train, seed=args.seed, start_step=step, **layout)
        valid_loader = None if self.valid is None else EvaluationLoader(self.valid, **layout)
        return train_loader, valid_loader, None
