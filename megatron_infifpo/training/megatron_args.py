"""Megatron's arguments of a run: the one place where its Namespace is made, and asked."""

import argparse
import copy
from collections.abc import Mapping
from typing import Any

from megatron.training import get_args
from megatron.training.training import should_disable_forward_pre_hook

from megatron_infifpo.engine.gpt import fixed_arguments, megatron_length, validated
from megatron_infifpo.engine.layer_kind import LayerKind, choose_kind
from megatron_infifpo.errors import UserError
from megatron_infifpo.families.architecture import architecture
from megatron_infifpo.flag_types import flag
from megatron_infifpo.megatron_flags.check import defaults
from megatron_infifpo.ranks import rank_and_size
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.training.config import RunConfig, run_parser
from megatron_infifpo.training.data import Datasets, lengths
from megatron_infifpo.training.experts import expert_arguments
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.rates import Schedule
from megatron_infifpo.training.resume import settled_schedule, stop
from megatron_infifpo.training.start import Start


def layers_of(config: RunConfig) -> LayerKind:
    """Choose the layers of a run; errors as `choose_kind`."""
    flags = config.flags
    return choose_kind(
        half=flags["bf16"] or flags["fp16"],
        fp8=flags["fp8"] is not None,
        transformer_impl=flags["transformer_impl"],
        te_attention=config.te_attention,
    )


def rows_of(config: RunConfig, kind: LayerKind) -> RowLayout:
    """How pairs lie in rows: with shared prompts where layers can, and there is what to share.

    Errors as `LayerKind.row_layout`.
    """
    flags, share = config.flags, config.share_prompt
    if config.method.responses == 1:
        share = False
    return kind.row_layout(
        flags["tensor_model_parallel_size"],
        context_parallel=flags["context_parallel_size"],
        fp8_recipe=flags["fp8_recipe"] if flags["fp8"] else None,
        share_prompt=share,
    )


def recomputes_attention(config: RunConfig) -> bool:
    """Whether attention is computed again without being asked for.

    Under context parallelism every layer would keep the keys and values of the whole row.
    """
    flags = config.flags
    asked = flags["recompute_granularity"] or flags["recompute_activations"]
    return flags["context_parallel_size"] > 1 and not asked


def megatron_args(
    config: RunConfig, start: Start, datasets: Datasets, kind: LayerKind
) -> argparse.Namespace:
    """Make Megatron's arguments of a run, checked and completed by Megatron.

    Args:
        config: the run as it was asked for.
        start: the checkpoint that it begins with.
        datasets: what it trains and validates on.
        kind: of its layers.

    Raises:
        UserError: a flag contradicts the checkpoint or the layers, has no effect, or Megatron
            refuses it; experts cannot be spread over the ranks; a batch cannot be laid out; a
            resumed run has another schedule.
    """
    usual, rows = defaults(run_parser()), rows_of(config, kind)
    values = copy.deepcopy(config.named())  # Megatron changes some of the lists
    values["_is_global_batch_size_explicitly_specified"] = True
    values["rank"], values["world_size"] = rank_and_size()
    values |= start.loaded_by_megatron(Folders.read(config.flags))
    values["layer_kind"] = kind.name
    values["share_prompt"] = rows.share_prompt
    values |= architecture(values, usual, start.folder)
    values |= expert_arguments(values)
    values |= _unless_given(fixed_arguments(kind), values, usual)
    if recomputes_attention(config):
        values["recompute_granularity"] = "selective"
    complete = values | lengths(config, values, datasets, rows)
    values = complete | stop(config.stop_at, complete, evaluates=values["eval_interval"] is None)
    limit, context = values["seq_length"], values["context_parallel_size"]
    args = validated(values | {"seq_length": megatron_length(limit, context)})
    args.seq_length = limit
    vars(args).update(
        settled_schedule(vars(args), start, length_matters=bool(config.method.growing))
    )
    args.lr_warmup_init = Schedule.read(vars(args)).first
    return args


def _unless_given(
    fixed: Mapping[str, Any], given: Mapping[str, Any], usual: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return arguments that leave no choice.

    Raises:
        UserError: the command line gives another value, which would have no effect.
    """
    for name, value in fixed.items():
        if given[name] not in (usual[name], value):
            raise UserError(
                f"{flag(name)} is {given[name]!r}, but only {value!r} works here: leave it out"
            )
    return fixed


def gathers_before_forward() -> bool:
    """Whether a forward pass begins with gathering parameters that the optimizer has changed."""
    return bool(should_disable_forward_pre_hook(get_args()))


def current_step() -> int | None:
    """Steps before the one that Megatron's loop is at; None before it has begun."""
    step: int | None = getattr(get_args(), "curr_iteration", None)
    return step


def pairs_seen() -> int:
    """Pairs of all steps that are done."""
    return int(get_args().consumed_train_samples)
