"""Resume with the distributed optimizer: in float32, with PyTorch's Adam or another, with few bits.

In float32 the optimizer's parameters are views of the model's, which autograd guards: Megatron 0.19
copies a checkpoint's into them without `no_grad`, and fails.

A fused Adam that goes on from PyTorch's gets its parameter groups from the checkpoint, where there
are none of its own options, and a count that is no integer. In bfloat16 with
`--use-precision-aware-optimizer` it keeps of a float32 parameter the 16 bits that bfloat16 lacks,
an int16; saved as whole parameters they become float32, which it does not take.

Megatron also expects Adam's step count where Transformer Engine and Apex have it, in the parameter
groups. PyTorch's Adam has it in the state of every parameter, so loading fails in three places,
each mended here: a fresh optimizer has no state to take the count from; the count is looked for
among the loaded tensors, or taken from the fresh state; and all parameters are given one and the
same count, which would then rise by the number of parameters in every step. And a rank that holds
none of the parameters, of experts on a pipeline stage without any, has no count at all.

`host_optimizer` mends what is partly on the host. Needless once Megatron's own tests resume with
PyTorch's Adam, from one Adam with another, and from all that it lets an optimizer be.
"""

import functools
from typing import Any

import megatron.core.optimizer.distrib_optimizer as megatron_optimizer
import torch

from megatron_infifpo.patches import host_optimizer


def make_resumable() -> None:
    """Mend what concerns the Adam that is installed. Idempotent."""
    distributed: Any = megatron_optimizer.DistributedOptimizer
    load_shards = distributed.load_parameter_state_from_dp_reshardable
    if hasattr(load_shards, "__wrapped__"):
        return
    distributed.load_parameter_state_from_dp_reshardable = torch.no_grad()(load_shards)
    if megatron_optimizer.HAVE_APEX_OR_TE:
        _complete_groups(distributed)
        _load_lacking_bits(distributed)
        host_optimizer.make_resumable(distributed)
    else:
        _keep_own_steps(distributed)


def _complete_groups(distributed: Any) -> None:
    """Give a fused Adam's groups what another Adam's lack."""
    load_state_dict = distributed.load_state_dict

    @functools.wraps(load_state_dict)
    def with_defaults(self: Any, state: dict[str, Any]) -> None:
        for group in state["optimizer"]["param_groups"]:
            for name, value in self.optimizer.defaults.items():
                group.setdefault(name, value)
            if "step" in group:
                group["step"] = int(group["step"])
        load_state_dict(self, state)

    distributed.load_state_dict = with_defaults


def _load_lacking_bits(distributed: Any) -> None:
    """Give a fused Adam the bits that its parameters lack in their own type."""
    set_states = distributed._set_main_param_and_optimizer_states

    @functools.wraps(set_states)
    def with_bits(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        has_bits = getattr(self.optimizer, "store_param_remainders", False)
        if has_bits and parameter.dtype == torch.bfloat16:
            tensors = {**tensors, "param": tensors["param"].to(torch.int16)}
        set_states(self, parameter, tensors)

    distributed._set_main_param_and_optimizer_states = with_bits


def _keep_own_steps(distributed: Any) -> None:
    """Let PyTorch's Adam have its counts where it looks for them."""
    sharded_state_dict, state_dict = distributed.sharded_state_dict, distributed.state_dict
    set_states = distributed._set_main_param_and_optimizer_states
    load_state_dict = distributed.load_state_dict

    @functools.wraps(sharded_state_dict)
    def with_state(self: Any, model: Any, is_loading: bool = False, **options: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model, is_loading, **options)

    @functools.wraps(state_dict)
    def of_nothing(self: Any) -> dict[str, Any]:
        if self.optimizer.state:
            return dict(state_dict(self))
        groups = self.optimizer.state_dict()["param_groups"]
        kept = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        return {"optimizer": {"param_groups": [group | {"step": None} for group in kept]}}

    @functools.wraps(set_states)
    def without_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {**tensors, "step": None})

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, state: dict[str, Any]) -> None:
        load_state_dict(self, state)
        for values in self.optimizer.state.values():
            values["step"] = values["step"].clone()

    distributed.sharded_state_dict, distributed.state_dict = with_state, of_nothing
    distributed._set_main_param_and_optimizer_states = without_step
    distributed.load_state_dict = with_own_steps
