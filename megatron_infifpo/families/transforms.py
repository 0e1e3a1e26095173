"""Invertible tensor layouts: how one Megatron tensor is made of Hugging Face tensors, and back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dims:
    """Sizes of a model that tensor shapes are made of.

    Attributes:
        heads, groups, head_dim: query heads, key-value heads, and the size of each.
        hidden, ffn, vocab: model width, inner width of the MLP, vocabulary without padding.
        experts: of a layer that has some, each with an MLP of its own; 0 where none has.
        expert_ffn, shared_ffn: inner widths of such an MLP, and of the one that all tokens go to.
    """

    heads: int
    groups: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    one: ClassVar[int] = 1

    @property
    def attention(self) -> int:
        """Width of the attention output: all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.groups * self.head_dim

    @property
    def qkv(self) -> int:
        """Rows of Megatron's linear_qkv: all query, key and value heads."""
        return (self.heads + 2 * self.groups) * self.head_dim

    @property
    def gate_up(self) -> int:
        """Rows of Megatron's linear_fc1: the gate, then the up projection."""
        return 2 * self.ffn

    @property
    def expert_gate_up(self) -> int:
        """The same of an expert."""
        return 2 * self.expert_ffn

    @property
    def shared_gate_up(self) -> int:
        """The same of the expert that all tokens go to."""
        return 2 * self.shared_ffn

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "Dims":
        """Take the sizes from Megatron arguments, as a family's `megatron_args` returns them."""
        return cls(
            heads=args["num_attention_heads"],
            groups=args["num_query_groups"],
            head_dim=args["kv_channels"],
            hidden=args["hidden_size"],
            ffn=args["ffn_hidden_size"],
            vocab=args["padded_vocab_size"],
            experts=args.get("num_experts") or 0,
            expert_ffn=args.get("moe_ffn_hidden_size") or 0,
            shared_ffn=args.get("moe_shared_expert_intermediate_size") or 0,
        )


@dataclass(frozen=True)
class Transform:
    """A layout and its inverse; neither changes values, so a round trip is exact to the bit.

    `to_hf` also runs on meta tensors: that is how the expected Hugging Face shapes are known.
    """

    to_megatron: Callable[[Sequence[Tensor], Dims], Tensor]
    to_hf: Callable[[Tensor, Dims], list[Tensor]]


def _interleave_qkv(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """Concatenate q, k, v `[rows, ...]` by key-value group, so that TP cuts between groups."""
    grouped = [part.unflatten(0, (dims.groups, -1)) for part in parts]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(tensor: Tensor, dims: Dims) -> list[Tensor]:
    queries = dims.attention // dims.groups
    grouped = tensor.unflatten(0, (dims.groups, -1))
    parts = grouped.split([queries, dims.head_dim, dims.head_dim], dim=1)
    return [part.flatten(0, 1) for part in parts]


def _interleave_fused_qkv(parts: Sequence[Tensor], dims: Dims) -> Tensor:
    """Interleave one tensor that holds all of q, then all of k, then all of v."""
    keys = dims.groups * dims.head_dim
    return _interleave_qkv(parts[0].split([dims.attention, keys, keys]), dims)


def _halves(interleaved: Tensor) -> Tensor:
    """Put the even rows `[experts, rows, ...]` before the odd ones."""
    return torch.cat([interleaved[:, ::2], interleaved[:, 1::2]], dim=1)


def _interleave_halves(tensor: Tensor) -> Tensor:
    return torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)


IDENTITY = Transform(lambda parts, dims: parts[0], lambda tensor, dims: [tensor])
# q_proj, k_proj, v_proj
QKV = Transform(_interleave_qkv, _split_qkv)
# qkv_proj
FUSED_QKV = Transform(
    _interleave_fused_qkv, lambda tensor, dims: [torch.cat(_split_qkv(tensor, dims))]
)
# gate_proj, up_proj
GATE_UP = Transform(
    lambda parts, dims: torch.cat(list(parts)), lambda tensor, dims: list(tensor.chunk(2))
)
# All experts' weights in one, input channels first: a gate and an up projection by turns; down.
ALL_GATE_UP = Transform(
    lambda parts, dims: _halves(parts[0].transpose(1, 2)),
    lambda tensor, dims: [_interleave_halves(tensor).transpose(1, 2)],
)
ALL_DOWN = Transform(
    lambda parts, dims: parts[0].transpose(1, 2), lambda tensor, dims: [tensor.transpose(1, 2)]
)
ALL_GATE_UP_BIASES = Transform(
    lambda parts, dims: _halves(parts[0]), lambda tensor, dims: [_interleave_halves(tensor)]
)
