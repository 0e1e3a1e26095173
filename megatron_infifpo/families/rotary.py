"""Rotary embeddings that Megatron's GPTModel has no arguments for, in any model of any kind.

A rope is what `ropes.canonical` makes of a config.json.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_infifpo.families.ropes import inverse_frequencies


def configure(config: GPTModelConfig, ropes: Sequence[Mapping[str, Any]]) -> None:
    """Leave Transformer Engine's fused rotation out where it would not scale."""
    if any(rope["attention_factor"] != 1.0 for rope in ropes):
        config.transformer.apply_rope_fusion = False


def set_rope(model: GPTModel, rope: Mapping[str, Any]) -> None:
    """Rotate the heads of all layers by a rope."""
    _turn(model.rotary_pos_emb, rope)
    for layer in model.decoder.layers:
        _scale(layer.self_attention, rope)


def set_layer_ropes(
    model: GPTModel, ropes: Sequence[Mapping[str, Any]], of_layers: Sequence[int]
) -> None:
    """Rotate the heads of each layer by one of several ropes.

    Args:
        model: whose attention is a `LayerRopeAttention`.
        ropes: all of them.
        of_layers: which one each layer of the whole model has.
    """
    model.rotary_pos_emb = _LayerRopes(model, ropes)
    for layer in model.decoder.layers:
        layer.self_attention.rope = of_layers[layer.layer_number - 1]
        _scale(layer.self_attention, ropes[layer.self_attention.rope])


def _turn(embedding: RotaryEmbedding, rope: Mapping[str, Any]) -> None:
    before = embedding.inv_freq
    embedding.inv_freq = inverse_frequencies(rope, 2 * len(before)).to(before.device)


def _scale(attention: SelfAttention, rope: Mapping[str, Any]) -> None:
    # What Megatron multiplies cosines and sines by, of queries and of keys.
    attention._yarn_concentration_factor = rope["attention_factor"]


class _LayerRopes(RotaryEmbedding):
    """Angles of several ropes: `[ropes, T, 1, 1, dim]`."""

    def __init__(self, model: GPTModel, ropes: Sequence[Mapping[str, Any]]):
        """Take sizes from the model's own rotary embedding."""
        config = model.config
        sizes = {
            "kv_channels": config.kv_channels,
            "rotary_percent": model.rotary_percent,
            "rotary_interleaved": config.rotary_interleaved,
            "use_cpu_initialization": config.use_cpu_initialization,
        }
        super().__init__(**sizes)
        self.all = [RotaryEmbedding(**sizes) for _ in ropes]
        for embedding, rope in zip(self.all, ropes, strict=True):
            _turn(embedding, rope)

    def forward(self, *args: Any, **options: Any) -> Tensor:
        """Return the angles of positions 0 ... T - 1."""
        return torch.stack([embedding(*args, **options) for embedding in self.all])


class LayerRopeAttention(SelfAttention):
    """Self-attention that takes its own layer's angles out of those of several ropes.

    Attributes:
        rope: which one; None where the model has one for all layers.
    """

    rope: int | None = None

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **options: Any) -> Any:
        """Attend; see Megatron's SelfAttention."""
        angles = rotary_pos_emb if self.rope is None else rotary_pos_emb[self.rope]
        return super().forward(*args, rotary_pos_emb=angles, **options)
