"""What Megatron does at every start, and what is not for us.

For Megatron 0.19. Needless once its wheel holds the Makefile of its data sets' helpers, or does not
ask for it, and once the warm-up has a flag.
"""

from typing import Any

import megatron.core.datasets.utils as dataset_utils
import megatron.core.rerun_state_machine as rerun
import megatron.training.initialize as initialize
import torch


def skip_helpers() -> None:
    """Do not compile the helpers of Megatron's data sets, which we do not use.

    0.19's wheel has no Makefile for them: rank 0 would exit, and the others wait for it for ever.
    """
    module: Any = dataset_utils
    module.compile_helpers = lambda: None


def skip_warm_up() -> None:
    """Do not warm up compiled functions.

    Megatron does at [sequence, micro-batch, MLP / TP], which our rows never have: with large
    micro-batches gigabytes a tensor, and a C compiler on every node.
    """
    module: Any = initialize
    module._warmup_jit_function = lambda tp_size=None: None


def remember_failed_steps() -> None:
    """Let a checkpoint be read that was saved for a gradient that is not finite; idempotent.

    Megatron keeps which check failed there, in two tuples that its list of safe types lacks.
    Needless once it has them.
    """
    torch.serialization.add_safe_globals([rerun.Call, rerun.Caller])
