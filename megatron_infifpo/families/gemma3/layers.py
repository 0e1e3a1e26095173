"""What Gemma 3 needs beyond Megatron's GPTModel, on Transformer Engine's and on the local layers.

`extras` is that entry of the arguments that this family makes from config.json.
"""

from collections.abc import Mapping
from typing import Any

from megatron.core.activations import fast_gelu
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.gpt import GPTModelConfig

from megatron_infifpo.families import parts, rotary
from megatron_infifpo.families.common import FamilyLayers, LayerParts
from megatron_infifpo.families.ropes import plain


def configure(config: GPTModelConfig, extras: Mapping[str, Any]) -> None:
    """Set what has no argument."""
    parts.configure(config, extras)
    transformer = config.transformer
    transformer.gated_linear_unit = True
    transformer.activation_func = fast_gelu  # tanh-GELU; Megatron's gelu is the exact one
    transformer.bias_activation_fusion = False


def complete(model: GPTModel, extras: Mapping[str, Any]) -> None:
    """Scale embeddings, and rotate local and global layers by their own angles."""
    parts.complete(model, extras)
    whole = plain(model.rotary_base)
    if extras["global_rope_factor"] != 1.0:
        whole |= {"rope_type": "linear", "factor": extras["global_rope_factor"]}
    of_layers = [int(is_local) for is_local in extras["local_layers"]]
    rotary.set_layer_ropes(model, (whole, plain(extras["local_rotary_base"])), of_layers)


def adapt_layer(layer: ModuleSpec, made_of: LayerParts) -> ModuleSpec:
    """Turn a GPT layer spec, in place, into Gemma 3's."""
    return parts.with_post_norms(parts.with_layer_ropes(layer, made_of), made_of)


LAYERS = FamilyLayers(adapt_layer, configure, complete, parts.embedding_scale)
