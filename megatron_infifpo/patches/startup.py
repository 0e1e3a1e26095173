"""What Megatron does at every start, and what is not for us.

Needless once its wheel holds the Makefile of its data sets' helpers, or does not ask for it, and
once the warm-up has a flag.
"""

from typing import Any

import megatron.core.datasets.utils as dataset_utils
import megatron.training.initialize as initialize


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
