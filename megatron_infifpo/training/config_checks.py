"""What is wrong with a run's flags, told before data or a checkpoint is looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_infifpo.errors import UserError
from megatron_infifpo.flag_types import check_number, check_positive, flag

if TYPE_CHECKING:
    from megatron_infifpo.training.config import RunConfig

# Flags that only some runs have a use for.
_OF_SOURCES = ("preference_sources", "preference_valid_sources")
_OF_REFERENCES = ("reference_check", "reference_probes", "reference_tolerance")
_OF_TARGETS = ("soft_targets", "valid_soft_targets")
_OF_VALIDATION = ("preference_valid_sources", "valid_soft_targets")
_COUNTS = ("micro_batch_size", "global_batch_size", "train_iters", "train_samples")
MOST_SEED = 2**31 - 1  # NumPy's generators take 32 bits, and Megatron adds to it by rank


def check_config(config: RunConfig) -> None:
    """Refuse flags that are missing, have no effect, or contradict each other.

    Raises:
        UserError: names them.
    """
    if config.preference_data is None:
        raise UserError("--preference-data is missing: the prefix of the pivot's token dataset")
    _check_data(config)
    _check_batch(config)
    for name in ("reference_tolerance", "sampler_tolerance"):
        check_number(config, name)
    if config.sampler_tolerance is not None and config.sampler_logprobs is None:
        raise UserError("--sampler-tolerance has no effect without --sampler-logprobs")
    for name in ("stop_at", "lora_rank"):
        check_positive(config, name)
    for name in ("lora_alpha", "lora_targets"):
        if getattr(config, name) is not None and config.lora_rank is None:
            raise UserError(f"{flag(name)} has no effect without --lora-rank")
    if config.stop_at is not None and config.flags["exit_interval"] is not None:
        raise UserError("give one of --stop-at (once) and --exit-interval (at its multiples)")
    if config.share_prompt is not None and config.method.responses == 1:
        raise UserError(
            f"--share-prompt has no effect: {config.method.objective} sees one response"
        )


def _check_data(config: RunConfig) -> None:
    name, method = f"--method {config.flags['method']}", config.method
    alone = f"with {name}, which has no reference"
    for fields_, useless, why in (
        (_OF_SOURCES, not method.reads_logprobs, alone),
        (_OF_REFERENCES, method.reference is None, alone),
        (_OF_TARGETS, not method.soft_targets, f"with {name}, which reads none"),
        (_OF_VALIDATION, config.preference_valid_data is None, "without --preference-valid-data"),
    ):
        for each in fields_ if useless else ():
            if getattr(config, each) is not None:
                raise UserError(f"{flag(each)} has no effect {why}: leave it out")
    if method.soft_targets and config.soft_targets is None:
        made = f"infifpo fuse-targets writes of {config.preference_data} and its sources"
        raise UserError(f"--soft-targets is missing: {name} learns from what {made}")
    both = (config.preference_data, config.preference_valid_data)
    for data, sources in zip(both, _OF_SOURCES, strict=True):
        if data and method.reads_logprobs and getattr(config, sources) is None:
            raise UserError(
                f"{flag(sources)} is missing: sources.yaml names the log-probs of {data}"
            )


def _check_batch(config: RunConfig) -> None:
    if (config.flags["micro_batch_size"] is None) == (config.micro_batch_tokens is None):
        raise UserError("give one of --micro-batch-size (pairs) and --micro-batch-tokens")
    if config.flags["global_batch_size"] is None:
        raise UserError("give --global-batch-size, in pairs")
    for name in ("preference_epochs", *_COUNTS):
        value = config.named()[name]
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} is {value}, expected at least 1")
    if not 0 <= config.flags["seed"] <= MOST_SEED:
        raise UserError(
            f"--seed is {config.flags['seed']}, expected a whole number from 0 to {MOST_SEED}"
        )
    for name in ("train_iters", "train_samples"):
        if config.preference_epochs is not None and config.flags[name] is not None:
            raise UserError(
                f"--preference-epochs has no effect with {flag(name)}: give one of them"
            )
