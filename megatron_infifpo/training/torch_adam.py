"""Resume with PyTorch's own Adam, where neither Transformer Engine nor Apex is installed.

Megatron 0.19's distributed optimizer expects the step count where fused Adam has it, in the
parameter groups. PyTorch's Adam has it in the state of every parameter, so loading a checkpoint
fails in three places, each mended here: a fresh optimizer has no state to take the count from; the
count is looked for among the loaded tensors; and all parameters are given one and the same count,
which would then rise by the number of parameters in every step.
"""

import functools
from typing import Any

import megatron.core.optimizer.distrib_optimizer as megatron_optimizer


def make_resumable() -> None:
    """Mend loading; does nothing where a fused Adam is installed, or a second time."""
    distributed: Any = megatron_optimizer.DistributedOptimizer
    if megatron_optimizer.HAVE_APEX_OR_TE or hasattr(distributed.load_state_dict, "__wrapped__"):
        return
    sharded_state_dict = distributed.sharded_state_dict
    set_states = distributed._set_main_param_and_optimizer_states
    load_state_dict = distributed.load_state_dict

    @functools.wraps(sharded_state_dict)
    def with_state(self: Any, model: Any, is_loading: bool = False, **options: Any) -> Any:
        if is_loading and not self.optimizer.state:
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model, is_loading, **options)

    @functools.wraps(set_states)
    def without_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        set_states(self, parameter, {"step": None, **tensors})

    @functools.wraps(load_state_dict)
    def with_own_steps(self: Any, state: dict[str, Any]) -> None:
        load_state_dict(self, state)
        for values in self.optimizer.state.values():
            values["step"] = values["step"].clone()

    distributed.sharded_state_dict = with_state
    distributed._set_main_param_and_optimizer_states = without_step
    distributed.load_state_dict = with_own_steps
