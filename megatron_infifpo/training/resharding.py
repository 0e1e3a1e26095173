"""Whether a run can go on from the optimizer state of its checkpoint, asked before it starts.

Each rank saves its parts of the distributed optimizer's flat buffers (Megatron's `dp_reshardable`).
That costs neither memory nor traffic, and fits every data-parallel size, but parts of a buffer have
no names. At another layout their sizes differ, which ends in a traceback once the model is built;
between kinds of layers only the order of parameters differs, so all sizes fit, and one parameter
would get the state of another. State saved with `--dist-ckpt-optim-fully-reshardable` consists of
whole parameters by name, and fits every layout.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.training.experts import LAYOUT as EXPERT_LAYOUT
from megatron_infifpo.training.start import Start

DISTRIBUTED = "use_distributed_optimizer"
# Megatron's arguments that the parts of buffers follow from, and the size of buckets.
LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "transformer_impl",
    "bf16",
    "fp16",
    "accumulate_allreduce_grads_in_fp32",
    "fp8_param_gather",
    "ddp_num_buckets",
)
# What an optimizer takes from its state, whatever the command line says.
KEPT = ("optimizer", "adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum")


def check_optimizer_state(run: Mapping[str, Any], start: Start) -> None:
    """Refuse to resume from optimizer state that does not fit the run.

    Args:
        run: its arguments, validated by Megatron.
        start: the checkpoint that it begins with.

    Raises:
        UserError: says what differs and what can be done.
    """
    if not start.resumed or run["no_load_optim"]:
        return
    saved, checkpoint = start.saved, start.checkpoint.directory
    if saved.get("no_save_optim"):
        raise UserError(
            f"{checkpoint} was saved with --no-save-optim and has no optimizer state: pass "
            "--no-load-optim to start with a fresh optimizer"
        )
    if run["no_save_optim"]:
        raise UserError(
            "--no-save-optim does not go with a resumed optimizer, which Megatron describes as it "
            "would save it: leave it out, or pass --no-load-optim too"
        )
    found = changed([name for name in KEPT if name in saved], saved, run)
    before, now = main_parameters(saved), main_parameters(run)
    if before != now:
        found.append(
            f"main parameters were {before} and are {now} (--use-precision-aware-optimizer)"
        )
    if (before := state_of_experts(saved)) != (now := state_of_experts(run)):
        found.append(
            f"the optimizer's state of experts was {before} and is {now}, as Megatron keeps it on "
            "these ranks (--expert-model-parallel-size 1, and expert- like tensor-parallel size)"
        )
    if found:
        raise UserError(
            f"{', '.join(found)}: the optimizer's state keeps what it was; resume as it was, or "
            "start with a fresh optimizer: --no-load-optim"
        )
    found = differences(saved, run, start.sharding)
    if found:
        raise UserError(
            f"the optimizer state in {checkpoint} does not fit this run: {', '.join(found)}. "
            "Resume as it was saved; or do so once with --dist-ckpt-optim-fully-reshardable, and "
            "what is saved then fits every layout; or start with a fresh optimizer: --no-load-optim"
        )


def main_parameters(args: Mapping[str, Any]) -> str:
    """Say how the optimizer keeps parameters, as Megatron decides and Transformer Engine does it.

    Loaded for what they are not, they would be converted, and training go on with other weights.

    Args:
        args: validated by Megatron; those of an older checkpoint may lack some.
    """
    aware = args.get("use_precision_aware_optimizer") and not args.get("optimizer_cpu_offload")
    if aware and args.get("bf16") and args.get("main_params_dtype") == torch.float32:
        return "the 16 bits that bfloat16 lacks"
    return "whole"


def state_of_experts(args: Mapping[str, Any]) -> str:
    """Say whether experts have an optimizer beside that of all else, which has other names.

    They have where their gradients are reduced over other ranks.

    Args:
        args: validated by Megatron; those of an older checkpoint may lack some.
    """
    sizes = [args.get(f"{kind}_parallel_size") for kind in ("tensor_model", "expert_tensor")]
    spread = (args.get("expert_model_parallel_size") or 1) > 1 or sizes[0] != sizes[1]
    return "apart" if args.get("num_experts") and spread else "with all other"


def changed(names: Sequence[str], saved: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    """Say which of these arguments differ; None, False and 0 are the same."""
    return [
        f"{name.replace('_', ' ')} was {saved.get(name)} and is {run.get(name)}"
        for name in names
        if (saved.get(name) or None) != (run.get(name) or None)
    ]


def differences(
    saved: Mapping[str, Any], run: Mapping[str, Any], sharding: str | None
) -> list[str]:
    """Say which arguments the optimizer state does not allow to differ, and do.

    Args:
        saved: Megatron's arguments in the checkpoint.
        run: those of the run.
        sharding: how the distributed optimizer was saved, None where there was none.
    """
    layout = (*LAYOUT, *EXPERT_LAYOUT) if run.get("num_experts") else LAYOUT
    names = (DISTRIBUTED, *(layout if sharding == "dp_reshardable" else ()))
    found = changed(names, saved, run)
    if sharding == "dp_reshardable":
        before, now = (bucket_size(args) or "all" for args in (saved, run))
        if before != now:
            found.append(
                f"gradients were reduced in buckets of {before} parameters, and are in ones of "
                f"{now} (--overlap-grad-reduce, --ddp-bucket-size)"
            )
    return found


def bucket_size(args: Mapping[str, Any]) -> int | None:
    """Return after how many parameters Megatron begins another bucket of a buffer; None: never."""
    if not args.get("overlap_grad_reduce"):
        return None
    ranks = args["data_parallel_size"] * args.get("context_parallel_size", 1)
    smallest = max(40_000_000, 1_000_000 * ranks)
    return args.get("ddp_bucket_size") or smallest
