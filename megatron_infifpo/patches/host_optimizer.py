"""Resume an optimizer whose state is partly on the host: `--optimizer-cpu-offload`.

Its parameter groups hold the classes of its two parts, which no safe reader of checkpoints takes,
so what is saved cannot be loaded: they are left out. Three more places of Megatron 0.19 would let
a resumed run go on with wrong numbers, and say nothing:

- The part on the GPU, Transformer Engine's Adam, has its count of steps in its groups. A loaded
  count gets into the groups of the whole, which the groups of both parts are set to before every
  step: the count would be the same in all of them.
- The part on the host, PyTorch's Adam, has a count in the state of every parameter. Loading by
  parts of buffers sets it to that of the made-up step that first makes a state: 1.
- Loading by parts of buffers puts main parameters into the state and not into the parts, which are
  right only where PyTorch loads in place.

Where whole parameters are loaded, what a rank keeps of them would be views of buffers that have the
state of all data-parallel ranks, and keep those in memory.

Needless once Megatron resumes such an optimizer with `TORCH_FORCE_WEIGHTS_ONLY_LOAD` set, and its
tests compare counts of steps.
"""

import functools
from typing import Any

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor


def make_resumable(distributed: Any) -> None:
    """Mend what the distributed optimizer saves and loads of one; call it once.

    Args:
        distributed: Megatron's class, whose `load_state_dict` completes groups.
    """
    _save_plain_groups(distributed)
    _keep_counts(distributed)
    _load_main_parameters(distributed)


def is_plain(value: Any) -> bool:
    """Whether a value is a number, a string, True, False, None, or a list or tuple of such."""
    if isinstance(value, list | tuple):
        return all(is_plain(each) for each in value)
    return value is None or isinstance(value, bool | int | float | str)


def alone(value: Any) -> Any:
    """Return a value; of a tensor that is part of a larger one, a copy."""
    part = isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes
    return value.clone() if part else value


def _save_plain_groups(distributed: Any) -> None:
    """Leave out of groups what is not plain; loading puts in the optimizer's own."""
    state_dict = distributed.state_dict

    @functools.wraps(state_dict)
    def with_plain_groups(self: Any) -> dict[str, Any]:
        state: dict[str, Any] = state_dict(self)
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            inner = state["optimizer"]
            inner["param_groups"] = [
                {name: value for name, value in group.items() if is_plain(value)}
                for group in inner["param_groups"]
            ]
        return state

    distributed.state_dict = with_plain_groups


def _keep_counts(distributed: Any) -> None:
    """Let either part count its steps from the loaded count on."""
    load_state_dict = distributed.load_state_dict
    set_states = distributed._set_main_param_and_optimizer_states

    @functools.wraps(load_state_dict)
    def with_counts_of_parts(self: Any, state: dict[str, Any]) -> None:
        load_state_dict(self, state)
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            for group in self.optimizer.param_groups:  # the parts have copies of it
                group.pop("step", None)

    @functools.wraps(set_states)
    def without_count(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            tensors = {name: alone(value) for name, value in tensors.items() if name != "step"}
        set_states(self, parameter, tensors)

    distributed.load_state_dict = with_counts_of_parts
    distributed._set_main_param_and_optimizer_states = without_count


def _load_main_parameters(distributed: Any) -> None:
    """Give the parts their main parameters where parts of buffers are loaded."""
    load_shards = distributed.load_parameter_state_from_dp_reshardable

    @functools.wraps(load_shards)
    def into_parts(self: Any, state: dict[str, Any]) -> None:
        load_shards(self, state)
        if isinstance(self.optimizer, HybridDeviceOptimizer):
            self.optimizer._sync_hdo_state_to_sub_optimizers()

    distributed.load_parameter_state_from_dp_reshardable = into_parts
