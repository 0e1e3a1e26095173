"""Modules of layers that packed preference rows need beyond Megatron's own.

A core attention that takes packed rows with shared prompts, on every kind of layers; and for
Megatron's local ones an RMSNorm that is legal under sequence parallelism. Checkpoint keys equal
those of Transformer Engine's layers, so checkpoints move between the two.
"""

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_infifpo.engine.packed import RowParams
from megatron_infifpo.errors import UserError

# Of a mask that PyTorch's attention is given at once; it makes float32 numbers of them.
MASK_ELEMENTS = 2**24


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square norm whose weight gradient is reduced under sequence parallelism.

    A zero-centred weight `w` scales by `1 + w`, in float32.
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


class OutputRMSNorm(RMSNorm):
    """The same for what no linear layer follows at once: heads, outputs of sublayers, the end.

    Transformer Engine's norm has an (empty) extra state in checkpoints there, and expects one.
    Before a linear layer its norm is a part of that layer, whose extra state the checkpoint has.
    """

    def get_extra_state(self) -> None:
        """Return nothing, which is saved."""

    def set_extra_state(self, state: None) -> None:
        """Take nothing."""


def _flash_takes(query: Tensor) -> bool:
    """Whether PyTorch's variable-length flash kernel runs on heads `[T, heads, head_dim]`."""
    half, size = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return query.device.type != "cpu" and half and size % 8 == 0 and size <= 256


@functools.cache
def check_flash_kernel() -> None:
    """Raise UserError if PyTorch's variable-length flash kernel is one without grouped heads."""
    from torch.nn.attention.varlen import varlen_attn

    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        raise UserError(
            f"PyTorch {torch.__version__}'s varlen_attn has no enable_gqa: expected torch >= 2.12"
        )


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: RowParams,
    *,
    scale: float | None,
    window: int,
    **more: Any,
) -> Any:
    """PyTorch's variable-length flash kernel on all segments of a row, causal.

    Args:
        query: `[T, heads, head_dim]`; `key` and `value`: `[T_kv, groups, head_dim]`.
        row: where segments lie.
        scale: of the products; None: one over the root of head_dim.
        window: tokens before itself that a token sees; -1: all.
        more: of `varlen_attn`.
    """
    from torch.nn.attention.varlen import varlen_attn

    check_flash_kernel()
    return varlen_attn(
        query,
        key,
        value,
        row.cu_seqlens_q,
        row.cu_seqlens_kv,
        row.max_seqlen_q,
        row.max_seqlen_kv,
        scale=scale,
        window_size=(window, 0),
        enable_gqa=True,
        **more,
    )


class PackedAttention(MegatronModule):
    """Causal attention inside each segment of a packed row, without a mask over the whole row.

    Layers with a sliding window see the last `window + 1` tokens of their segment. The keys of a
    segment may begin with a prompt that lies elsewhere in the row. Under context parallelism a rank
    has queries of a part of the row, and gathers the keys and values of all of it.

    On CUDA one variable-length flash kernel serves all segments. On the CPU, and for what that
    kernel does not take (float32, odd or large heads), each segment is one call of PyTorch's
    scaled-dot-product attention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
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
        self.context_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context_group = pg_collection.cp
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
                Under context parallelism those of the rank's own part of the row.
            packed_seq_params: a `RowParams`. A segment's queries are the last ones of its keys.

        Returns:
            `[T, 1, heads * head_dim]`.
        """
        row = packed_seq_params
        assert isinstance(row, RowParams)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if self.context_group is not None:
            both = torch.stack([key, value], dim=1)
            both = gather_from_sequence_parallel_region(both, group=self.context_group)
            key, value = both.unbind(dim=1)
        if row.key_rows is not None:
            key, value = key.index_select(0, row.key_rows), value.index_select(0, row.key_rows)
        kernel = self._varlen if _flash_takes(query) else self._by_segment
        return kernel(query, key, value, row).flatten(1).unsqueeze(1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        """One flash kernel for all segments, `[T, heads, head_dim]`."""
        found: Tensor = flash_attention(
            query, key, value, row, scale=self.scale, window=self.window
        )
        return found

    def _by_segment(self, query: Tensor, key: Tensor, value: Tensor, row: RowParams) -> Tensor:
        """One call of PyTorch's attention a segment, `[T, heads, head_dim]`."""
        if query.shape[1] != key.shape[1] and query.device.type != "cpu":
            # PyTorch's memory-efficient kernel takes no grouped heads, and its plain one would hold
            # the scores of a whole segment.
            copies = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
        parts = [query.split(row.query_lengths)]
        parts += [x.split(row.key_lengths) for x in (key, value)]
        outputs = []
        for segment in zip(*parts, strict=True):
            heads = [x.transpose(0, 1).unsqueeze(0) for x in segment]  # [1, heads, L, head_dim]
            outputs.append(self._segment(*heads).squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def _segment(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a segment; some queries after the other where their mask would be large."""
        queries, keys = query.shape[2], key.shape[2]
        most = self._most(query.shape[1])
        if queries * keys <= most or self._maskless(queries, keys):
            return self._attend(query, key, value)
        rows = most // keys
        if self.window >= 0:  # a block of so many sees twice as many keys
            rows = min(self.window + 1, most // (2 * self.window + 2))
        blocks = []
        for begin in range(0, queries, max(1, rows)):
            end, before = min(begin + max(1, rows), queries), keys - queries
            seen = slice(
                0 if self.window < 0 else max(0, before + begin - self.window), before + end
            )
            block = (query[:, :, begin:end], key[:, :, seen], value[:, :, seen])
            # Masks are made again in the backward pass: together they are as large as the whole.
            blocks.append(
                checkpoint(self._attend, *block, use_reentrant=False, preserve_rng_state=False)
            )
        return torch.cat(blocks, dim=2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """PyTorch's attention of queries that are the last ones of their keys."""
        mask = self._mask(query.shape[2], key.shape[2], query.device)
        gqa = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.scale, enable_gqa=gqa
        )

    def _most(self, heads: int) -> int:
        """Pairs of a query and a key that are computed at once, where they cost memory."""
        return MASK_ELEMENTS

    def _maskless(self, queries: int, keys: int) -> bool:
        """Whether a segment of any length costs no memory for pairs."""
        return queries == keys and self._unlimited(keys)

    def _unlimited(self, keys: int) -> bool:
        """Whether the window reaches over so many keys."""
        return self.window < 0 or keys <= self.window + 1

    def _mask(self, queries: int, keys: int, device: torch.device) -> Tensor | None:
        """Mask `[queries, keys]` of a segment, or None where plain causality will do."""
        inside = self._unlimited(keys)
        if inside and queries == keys:
            return None
        before = keys - queries  # tokens of the shared prompt
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(before)
        return mask if inside else mask.triu(before - self.window)
