"""Parts of layers that several families have beyond GPT's, on every kind of layers.

The functions of a `FamilyLayers` that `extras` steer; what these may hold, all of it optional:

    softmax_scale     what attention's products are multiplied by
    sublayer_scale    what attention and MLP are multiplied by before they join the residual
    embedding_scale   what embeddings are multiplied by
    logit_scale       what logits are multiplied by
    interleaved       rotate neighbouring channels, not those of a head's halves
    ropes, of_layers  several ropes, and which one each layer has; for `LayerRopeAttention`
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_infifpo.families import rotary
from megatron_infifpo.families.common import LayerParts


def configure(config: GPTModelConfig, extras: Mapping[str, Any]) -> None:
    """Set what has no argument."""
    transformer = config.transformer
    if "softmax_scale" in extras:
        transformer.softmax_scale = extras["softmax_scale"]
    if extras.get("interleaved"):
        transformer.rotary_interleaved = True
        transformer.apply_rope_fusion = False
    rotary.configure(config, extras.get("ropes", ()))


def embedding_scale(extras: Mapping[str, Any]) -> float:
    """What embeddings are multiplied by."""
    scale: float = extras.get("embedding_scale", 1.0)
    return scale


def complete(model: GPTModel, extras: Mapping[str, Any]) -> None:
    """Scale what is to be scaled, and give each layer its rope."""
    if "ropes" in extras:
        rotary.set_layer_ropes(model, extras["ropes"], extras["of_layers"])
    if model.pre_process and "embedding_scale" in extras:
        # Rounded to the weights' dtype first, as transformers does.
        scale_embedding = torch.tensor(extras["embedding_scale"], dtype=model.config.params_dtype)
        model.embedding.register_forward_hook(_times(scale_embedding.item()))
    if "sublayer_scale" in extras:
        for layer in model.decoder.layers:
            # Of the whole sublayers, with what an adapter adds to their projections.
            for sublayer in (layer.self_attention, layer.mlp):
                sublayer.register_forward_hook(_times(extras["sublayer_scale"]))
    if model.post_process and "logit_scale" in extras:
        model.decoder.final_layernorm.register_forward_hook(_times(extras["logit_scale"]))


def _times(factor: float) -> Callable[..., Any]:
    """A hook that multiplies a module's output, or the first of two that has no bias."""

    def scale(_: torch.nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            assert output[1] is None, "a bias would have to be scaled too"
            return output[0] * factor, None
        return output * factor

    return scale


def with_post_norms(layer: ModuleSpec, parts: LayerParts) -> ModuleSpec:
    """Normalise what attention and MLP return before it joins the residual; changes the layer."""
    attention, mlp = layer.submodules.self_attention.submodules, _mlp(layer)
    attention.linear_proj = _with_post_norm(attention.linear_proj, parts.norm)
    mlp.linear_fc2 = _with_post_norm(mlp.linear_fc2, parts.norm)
    return layer


def with_layer_ropes(layer: ModuleSpec, parts: LayerParts) -> ModuleSpec:
    """Let attention take its own layer's angles; changes the layer."""
    layer.submodules.self_attention.module = rotary.LayerRopeAttention
    return layer


def without_pre_norms(layer: ModuleSpec, parts: LayerParts) -> ModuleSpec:
    """Leave out the norms before attention and MLP; changes the layer."""
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.linear_qkv = parts.column
    _mlp(layer).linear_fc1 = parts.column
    return layer


def _mlp(layer: ModuleSpec) -> Any:
    return layer.submodules.mlp.keywords["submodules"]


def _with_post_norm(linear: type, norm: Any) -> type:
    """Return a row-parallel linear layer whose output is normalised.

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
            assert bias is None, "a bias would have to be normalised too"
            return self.post_layernorm(output), None

    return PostNormLinear


class WholeNorm(torch.nn.Module):
    """Root-mean-square norm over all heads together, of which a rank has its own."""

    def __init__(
        self, config: TransformerConfig, heads: int, group: torch.distributed.ProcessGroup
    ):
        """Take the number of heads of all ranks of tensor parallelism, and their group."""
        super().__init__()
        self.size, self.eps, self.group = (
            heads * config.kv_channels,
            config.layernorm_epsilon,
            group,
        )
        mine = torch.ones(self.size // group.size(), dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(mine.to(torch.cuda.current_device()))
        # Each rank has a part of its own: a norm of gradients counts all of them.
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[T, 1, heads / TP, head_dim]`."""
        precise = x.flatten(2).float()
        # Every rank's sum enters the output of all ranks: forward and backward add up.
        squares = reduce_from_tensor_model_parallel_region(
            precise.square().sum(-1, keepdim=True), group=self.group
        )
        squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = precise * torch.rsqrt(squares / self.size + self.eps) * self.weight
        return normed.to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Describe the part of the weight that this rank has, to Megatron's checkpoints."""
        groups = {"tp_group": self.group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"weight": 0}, sharded_offsets, **groups
        )

    def get_extra_state(self) -> None:
        """Return nothing, which is saved: checkpoints have one of every norm of a layer."""

    def set_extra_state(self, state: None) -> None:
        """Take nothing."""


class WholeNormAttention(rotary.LayerRopeAttention):
    """Self-attention with a norm over all query heads, and one over all key heads."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any):
        """Take the arguments of Megatron's SelfAttention."""
        super().__init__(config, *args, **options)
        groups: ProcessGroupCollection = self.pg_collection
        # Not by --qk-layernorm: Megatron would add up the gradients of different parts.
        self.q_layernorm = WholeNorm(config, config.num_attention_heads, groups.tp)
        self.k_layernorm = WholeNorm(config, config.num_query_groups, groups.tp)
