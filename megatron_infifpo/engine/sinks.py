"""Attention sinks: a learnt score for each head that takes its share of every softmax.

A sink is a key without a value, `exp(s) / (exp(sink) + sum exp(s))`, in every window.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_infifpo.engine.layers import PackedAttention, flash_attention
from megatron_infifpo.engine.packed import RowParams


class SinkAttention(PackedAttention):
    """Packed attention whose heads have sinks, `softmax_offset` in Megatron's checkpoints."""

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any):
        """Take the arguments of `PackedAttention`."""
        super().__init__(config, *args, **options)
        assert config.softmax_type == "learnable"
        self.tp_group = options["pg_collection"].tp
        heads = config.num_attention_heads // self.tp_group.size()
        sinks = torch.zeros(heads, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.softmax_offset = torch.nn.Parameter(sinks)
        # Each rank has heads of its own: a norm of gradients counts all of them.
        set_tensor_model_parallel_attributes(self.softmax_offset, True, 0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Describe this rank's sinks to Megatron's checkpoints."""
        groups = {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state, prefix, {"softmax_offset": 0}, sharded_offsets, **groups
        )

    def get_extra_state(self) -> None:
        """Return nothing, which is saved: Transformer Engine's attention has one, with sinks."""

    def set_extra_state(self, state: None) -> None:
        """Take nothing."""

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        options = (self.scale, self.window)
        out: Tensor = FlashWithSinks.apply(query, key, value, self.softmax_offset, row, options)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = self._mask(query.shape[2], key.shape[2], query.device)
        return attend_with_sinks(query, key, value, self.softmax_offset, mask, self.scale)

    def _most(self, heads: int) -> int:
        return super()._most(heads) // heads  # scores of every head

    def _maskless(self, queries: int, keys: int) -> bool:
        return False


def attend_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Plain attention with sinks, in float32 at least.

    Args:
        query: `[1, heads, queries, head_dim]`; `key`, `value`: `[1, groups, keys, head_dim]`.
        sinks: `[heads]`.
        mask: `[queries, keys]`, true where a query sees a key; None: plain causality.
        scale: of the products; None: one over the root of head_dim.
    """
    copies, wide = query.shape[1] // key.shape[1], torch.promote_types(query.dtype, torch.float32)
    key, value = (x.repeat_interleave(copies, dim=1).to(wide) for x in (key, value))
    scores = query.to(wide) @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    column = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    shares = torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
    return (shares @ value).to(query.dtype)


class FlashWithSinks(torch.autograd.Function):
    """PyTorch's variable-length flash kernel, with sinks in forward and backward.

    Its outputs are scaled by `sigmoid(lse - sink)`. Its backward kernel makes probabilities again
    of the log-sum-exp, and takes the products of outputs and their gradients from them: given both
    with the sinks in them, it is that of the softmax with sinks.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, row: Any, options: Any
    ) -> Tensor:
        """Attend, `[T, heads, head_dim]`; `sinks` is `[heads]`, `row` a `RowParams`.

        `options` are `scale` and `window`: of `varlen_attn`, and tokens before a query, -1: all.
        """
        from torch.nn.attention.varlen import AuxRequest

        scale, window = options
        lse_too = AuxRequest(lse=True)
        out, lse = flash_attention(
            query, key, value, row, scale=scale, window=window, return_aux=lse_too
        )
        assert lse.shape == query.shape[1::-1], "the kernel has its log-sum-exp as [heads, T]"
        whole = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = out * (lse - whole).exp().mT.unsqueeze(-1).to(out.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, whole)
        ctx.row, ctx.options = row, options
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Gradients of query, key, value and sinks."""
        (gradient,) = gradients
        query, key, value, sinks, out, whole = ctx.saved_tensors
        row, (scale, window) = ctx.row, ctx.options
        gradient = gradient.contiguous()
        found = torch.ops.torch_attn._varlen_attn_backward(
            gradient,
            query,
            key,
            value,
            out,
            whole,
            row.cu_seqlens_q,
            row.cu_seqlens_kv,
            row.max_seqlen_q,
            row.max_seqlen_kv,
            window < 0,
            torch.zeros(2, dtype=torch.uint64, device=query.device),  # no dropout
            scale,
            [window, 0],
        )
        taken = (sinks.to(whole.dtype)[:, None] - whole).exp()
        products = (gradient.to(whole.dtype) * out.to(whole.dtype)).sum(-1)
        of_sinks = -(taken * products.mT).sum(1).to(sinks.dtype)
        return *found, of_sinks, None, None
