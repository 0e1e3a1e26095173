"""What gpt-oss needs beyond Megatron's GPTModel, all of it in Megatron's own configuration.

`extras` is that entry of the arguments that this family makes from config.json.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.activations import quick_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.training.models.gpt import GPTModelConfig

from megatron_infifpo.families import parts
from megatron_infifpo.families.common import FamilyLayers


def configure(config: GPTModelConfig, extras: Mapping[str, Any]) -> None:
    """Set what has no argument."""
    parts.configure(config, extras)
    transformer = config.transformer
    transformer.softmax_type = "learnable"
    transformer.gated_linear_unit = True
    transformer.activation_func = quick_gelu
    transformer.activation_func_clamp_value = extras["swiglu_limit"]
    transformer.glu_linear_offset = 1.0
    transformer.bias_activation_fusion = False
    # Not beside biases of experts.
    transformer.bias_dropout_fusion = False


def complete(model: GPTModel, extras: Mapping[str, Any]) -> None:
    """Mend biases of local experts in Megatron 0.19; Transformer Engine's are right.

    Megatron adds them in place to what came of a function of its own, which autograd does not let
    anybody change. Under sequence parallelism it adds up their gradients twice: over the ranks that
    have the same expert, as those of weights, and over those of tensor parallelism.
    """
    for layer in model.decoder.layers:
        for expert in getattr(layer.mlp.experts, "local_experts", ()):
            expert.linear_fc2.register_forward_hook(_of_its_own)
            expert.linear_fc2.bias.sequence_parallel = False


def _of_its_own(_: torch.nn.Module, __: Any, output: Any) -> Any:
    return output[0].clone(), output[1]


LAYERS = FamilyLayers(configure=configure, complete=complete)
