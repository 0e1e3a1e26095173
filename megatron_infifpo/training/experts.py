"""What a run of a model with experts needs beside its flags, and what it cannot have."""

from collections.abc import Mapping
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu

LAYOUT = ("expert_model_parallel_size", "expert_tensor_parallel_size")
# Of losses on routers, which are added to the one that is trained for.
BALANCING = ("moe_aux_loss_coeff", "moe_z_loss_coeff")


def expert_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron's arguments of experts that no flag has said.

    Args:
        given: Megatron's arguments by name, with the model's architecture.

    Raises:
        UserError: a flag without effect, or one that does not go with experts; or ranks that they
            cannot be spread over.
    """
    _check_parts(given)
    if not given["num_experts"]:
        _check_none(given)
        return {}
    expert_tensor = given["expert_tensor_parallel_size"] or 1
    _check_layout(given, expert_tensor)
    if given["fp8"]:
        raise UserError(
            "--fp8-format has not been seen to work with experts, whose tokens come in any number: "
            "leave it out"
        )
    if given["mlp_chunks_for_training"] > 1:
        raise UserError("--mlp-chunks-for-training does not go with experts: leave it out")
    coefficient = _coefficient(given["moe_aux_loss_coeff"])
    return {
        # Megatron's default splits each expert as other tensors are: small ones want to be whole.
        "expert_tensor_parallel_size": expert_tensor,
        "moe_aux_loss_coeff": coefficient,
        "moe_router_load_balancing_type": "aux_loss" if coefficient else "none",
    }


def balances(args: Mapping[str, Any]) -> bool:
    """Whether a loss on routers is added; of Megatron's arguments, by name."""
    return bool(args["num_experts"]) and any(args[name] for name in BALANCING)


def _check_none(given: Mapping[str, Any]) -> None:
    """Refuse flags of experts for a model that has none; its layout is looked at elsewhere."""
    flags = {f"--{name.replace('_', '-')}": given[name] for name in BALANCING}
    for flag, value in flags.items():
        if value:
            raise UserError(f"{flag} has no effect: the model has no experts; leave it out")


def _check_parts(given: Mapping[str, Any]) -> None:
    """Refuse to compute parts again that no layer has."""
    experts, shared = given["num_experts"], given["moe_shared_expert_intermediate_size"]
    lacking = {
        "mlp": experts and all(given["moe_layer_freq"]) and "an MLP beside its experts",
        "moe": not experts and "experts",
        "shared_experts": not (experts and shared) and "shared experts",
    }
    for part in given["recompute_modules"] or ():
        if what := lacking.get(part):
            raise UserError(
                f"--recompute-modules {part} has no effect: no layer of the model has {what}; "
                "leave it out"
            )


def _check_layout(given: Mapping[str, Any], expert_tensor: int) -> None:
    """Refuse ranks that a model's experts cannot be spread over."""
    tensor, expert = given["tensor_model_parallel_size"], given["expert_model_parallel_size"]
    if tensor > 1 and not given["sequence_parallel"]:
        raise UserError(
            "--tensor-model-parallel-size needs --sequence-parallel for a model with experts, "
            "which would compute each token on every rank: add it"
        )
    if expert_tensor > 1 and expert > 1 and cpu.is_enabled():
        raise UserError(
            "--expert-tensor-parallel-size does not go with --expert-model-parallel-size on a CPU: "
            "gloo has no sums of parts of unequal sizes; leave one of them out"
        )
    pipeline, ranks = given["pipeline_model_parallel_size"], given["world_size"]
    size = expert * expert_tensor * pipeline
    if ranks % size:
        raise UserError(
            f"{ranks} ranks cannot be split into expert x expert tensor x pipeline parallel groups "
            f"of {expert} x {expert_tensor} x {pipeline}"
        )


def _coefficient(value: float | list[float]) -> float:
    """The coefficient of the auxiliary loss: Megatron takes one for each of several."""
    values = value if isinstance(value, list) else [value]
    if len(values) != 1 or values[0] < 0:
        raise UserError(f"--moe-aux-loss-coeff is {value}, expected one number of at least 0")
    return values[0]
