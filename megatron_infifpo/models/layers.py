"""Layer specs: Transformer Engine's where it is installed, else Megatron's local one made packable.

Megatron's local spec lacks two things that packed preference rows need: an RMSNorm that is legal
under sequence parallelism, and a core attention that takes packed rows. Both are here. Checkpoint
keys equal those of the TE spec, so checkpoints move between the two.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_infifpo.models.packed import RowParams


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm whose weight gradient is reduced under sequence parallelism.

    A zero-centred weight `w` (Gemma) scales by `1 + w`, in float32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object):
        """Take the arguments of Megatron's other norms; the rest does not concern this one."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centered = config.layernorm_zero_centered_gamma
        # Each rank sees its own tokens only: Megatron sums the gradients of weights so marked.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        if not self.zero_centered:
            return super().forward(x)
        scale = 1.0 + self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, scale, self.eps).type_as(x)


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed row, without a mask over the whole row.

    Layers with a sliding window see the last `window + 1` tokens of their segment. The keys of a
    segment may begin with a prompt that lies elsewhere in the row.

    On CUDA one variable-length flash kernel serves all segments; on the CPU, and in float32, which
    that kernel does not take, each segment is one call of PyTorch's scaled-dot-product attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ):
        """Take the arguments of Megatron's other core attentions.

        Raises:
            ValueError: attention dropout, which would differ between packings.
        """
        super().__init__(config)
        if config.attention_dropout:
            raise ValueError(
                f"attention_dropout is {config.attention_dropout}, but packed attention has none: "
                "pass --attention-dropout 0"
            )
        assert attention_type == "self"
        self.scale = softmax_scale
        windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        # Tokens before itself that a token sees; -1: all.
        self.window = config.window_size[0] if windowed else -1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: object,
    ) -> Tensor:
        """Attend.

        Args:
            query: `[T, 1, heads, head_dim]`; `key` and `value`: `[T, 1, groups, head_dim]`.
            packed_seq_params: a `RowParams`. A segment's queries are the last ones of its keys.

        Returns:
            `[T, 1, heads * head_dim]`.
        """
        row = packed_seq_params
        assert isinstance(row, RowParams)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if row.key_rows is not None:
            key, value = key.index_select(0, row.key_rows), value.index_select(0, row.key_rows)
        kernel = (
            self._varlen if query.is_cuda and query.dtype != torch.float32 else self._by_segment
        )
        return kernel(query, key, value, row).flatten(1).unsqueeze(1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        """One flash kernel for all segments, `[T, heads, head_dim]`."""
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn(  # type: ignore[return-value]  # one tensor without return_aux
            query,
            key,
            value,
            row.cu_seqlens_q,
            row.cu_seqlens_kv,
            row.max_seqlen_q,
            row.max_seqlen_kv,
            scale=self.scale,
            window_size=(self.window, 0),  # causal
            enable_gqa=True,
        )

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        """One call of PyTorch's attention a segment, `[T, heads, head_dim]`."""
        parts = [query.split(row.cu_seqlens_q.diff().tolist())]
        parts += [x.split(row.cu_seqlens_kv.diff().tolist()) for x in (key, value)]
        outputs = []
        for segment in zip(*parts, strict=True):
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in segment)  # [1, heads, L, head_dim]
            mask = self._mask(q.shape[2], k.shape[2], q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
            )
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Mask `[queries, keys]` of a segment, or None where plain causality will do."""
        inside = self.window < 0 or keys <= self.window + 1
        if inside and queries == keys:
            return None
        before = keys - queries  # tokens of the shared prompt
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
        return mask if inside else mask.triu(before - self.window)


def local_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """A layer of Megatron's local modules, our norm and our attention."""
    layer: ModuleSpec = get_gpt_layer_local_spec(
        normalization=config.normalization, qk_layernorm=config.qk_layernorm
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer


def block_of(
    layer: ModuleSpec, norm: Any, config: TransformerConfig, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Layers of this pipeline stage, and the norm after the last."""
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)
