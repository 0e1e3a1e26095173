"""What Gemma 3 needs beyond Megatron's GPTModel, on Transformer Engine's and on the local layers.

`extras` is that entry of the arguments that this family makes from config.json.
"""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.activations import fast_gelu
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_infifpo.families.common import FamilyLayers


def configure(config: GPTModelConfig, extras: Mapping[str, Any]) -> None:
    """Set what has no argument."""
    transformer = config.transformer
    transformer.gated_linear_unit = True
    transformer.activation_func = fast_gelu  # tanh-GELU; Megatron's gelu is the exact one
    transformer.bias_activation_fusion = False
    transformer.softmax_scale = extras["softmax_scale"]
    # Read by LocalGlobalAttention, which Megatron builds with nothing but the configuration.
    transformer.local_layers = tuple(extras["local_layers"])


def embedding_scale(extras: Mapping[str, Any]) -> float:
    """What embeddings are multiplied by."""
    scale: float = extras["embedding_scale"]
    return scale


def complete(model: GPTModel, extras: Mapping[str, Any]) -> None:
    """Scale embeddings, and rotate local and global layers by their own angles."""
    if model.pre_process:
        # Rounded to the weights' dtype first, as transformers does.
        factor = torch.tensor(embedding_scale(extras), dtype=model.config.params_dtype).item()

        def scale(_: torch.nn.Module, __: Any, embedded: Tensor) -> Tensor:
            return embedded * factor

        model.embedding.register_forward_hook(scale)
    model.rotary_pos_emb = LocalGlobalRope(model, extras)


class LocalGlobalRope(RotaryEmbedding):
    """Angles of both kinds of layers: `[2, T, 1, 1, head_dim]`, local ones first."""

    def __init__(self, model: GPTModel, extras: Mapping[str, Any]):
        """Take sizes and the global base from the model's own rotary embedding."""
        common = {"kv_channels": model.config.kv_channels, "rotary_percent": 1.0}
        common["use_cpu_initialization"] = model.config.use_cpu_initialization
        factor = extras["global_rope_factor"]
        super().__init__(
            rotary_base=model.rotary_base,
            seq_len_interpolation_factor=None if factor == 1.0 else factor,
            **common,
        )
        self.local = RotaryEmbedding(rotary_base=extras["local_rotary_base"], **common)

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Return the angles of positions 0 ... T - 1."""
        whole = super().forward(*args, **options)
        return torch.stack([self.local(*args, **options), whole])


class LocalGlobalAttention(SelfAttention):
    """Self-attention that takes its own kind's angles out of `LocalGlobalRope`'s."""

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **options: Any) -> Any:
        """Attend; see Megatron's SelfAttention."""
        is_local = self.config.local_layers[self.layer_number - 1]
        angles = rotary_pos_emb[0 if is_local else 1]
        return super().forward(*args, rotary_pos_emb=angles, **options)


def with_post_norm(linear: type, norm: Any) -> type:
    """Return a row-parallel linear layer whose output is normalised before it joins the residual.

    Args:
        linear: Megatron's or Transformer Engine's RowParallelLinear.
        norm: built with the configuration, the hidden size and eps.
    """

    class PostNormLinear(linear):
        def __init__(self, *args: Any, config: Any, **options: Any):
            super().__init__(*args, config=config, **options)
            self.post_layernorm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
            output, bias = super().forward(*args, **options)
            assert bias is None, "Gemma 3 has no biases"
            return self.post_layernorm(output), None

    return PostNormLinear


def adapt_layer(layer: ModuleSpec, norm: Any) -> ModuleSpec:
    """Turn a GPT layer spec, in place, into Gemma 3's."""
    attention = layer.submodules.self_attention
    attention.module = LocalGlobalAttention
    attention.submodules.linear_proj = with_post_norm(attention.submodules.linear_proj, norm)
    mlp = layer.submodules.mlp.keywords["submodules"]
    mlp.linear_fc2 = with_post_norm(mlp.linear_fc2, norm)
    return layer


LAYERS = FamilyLayers(adapt_layer, configure, complete, embedding_scale)
