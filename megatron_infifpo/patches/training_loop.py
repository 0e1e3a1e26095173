"""Let Megatron's training loop and its evaluation run their steps by a schedule of ours.

Needless once `pretrain` takes a schedule. It takes a communicator, but only with process groups,
and makes those itself.
"""

from collections.abc import Callable
from typing import Any

import megatron.training.training as loop


def use_schedule(get_schedule: Callable[..., Callable[..., list[Any]]]) -> None:
    """Put `get_schedule` in the place of Megatron's `get_forward_backward_func`."""
    module: Any = loop
    module.get_forward_backward_func = get_schedule
