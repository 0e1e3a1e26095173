"""Let Transformer Engine's linear layers add weight gradients themselves, without Apex.

Megatron 0.19 has one flag for all linear layers, and its own need Apex for it: the output layer of
a Transformer Engine model refuses to be built. Our head runs in that layer's place and adds its
gradient itself. Needless once Megatron asks for Apex where it calls it.
"""

from typing import Any

import megatron.core.tensor_parallel.layers as layers


def allow_fused_gradients() -> None:
    """Take back the check; local layers have the flag off where Apex is missing."""
    module: Any = layers
    module._grad_accum_fusion_available = True
