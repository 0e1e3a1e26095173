"""What CUDA kernels compute, as their documentation has it, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Flash attention over segments: causality and windows count from the bottom right corner.

    Args:
        query: `[T, heads, head_dim]`; `key` and `value`: `[T_kv, groups, head_dim]`.
        query_borders, key_borders: int32 `[S + 1]`.
        scale: of the products; by default 1 / sqrt(head_dim).
        window: how many keys to the left and to the right of its own a query sees; -1: all.

    Returns:
        `[T, heads, head_dim]`.
    """
    left, right = window
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    for segment in range(len(query_borders) - 1):
        rows = slice(int(query_borders[segment]), int(query_borders[segment + 1]))
        columns = slice(int(key_borders[segment]), int(key_borders[segment + 1]))
        q, k, v = query[rows], key[columns], value[columns]
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        own = torch.arange(len(q))[:, None] + len(k) - len(q)
        other = torch.arange(len(k))[None]
        seen = torch.ones(len(q), len(k), dtype=torch.bool)
        if left >= 0:
            seen &= other >= own - left
        if right >= 0:
            seen &= other <= own + right
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs)


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> tuple[Tensor, Tensor]:
    """Normalised rows in the type of x, and 1 / root-mean-square of each row in float32."""
    wide = x.float()
    inverse = wide.square().mean(dim=-1).add(eps).rsqrt()
    scale = weight.float() + 1 if zero_centered else weight.float()
    return (wide * inverse[..., None] * scale).to(x.dtype), inverse


def rms_norm_gradients(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` with respect to x and to the weight."""
    upstream = grad.float().view(-1, x.shape[-1])
    normal = x.float().view_as(upstream) * inverse.view(-1, 1)
    scale = weight.float() + 1 if zero_centered else weight.float()
    inner = upstream * scale
    grad_x = (inner - normal * (inner * normal).mean(dim=-1, keepdim=True)) * inverse.view(-1, 1)
    return grad_x.view_as(x).to(x.dtype), (upstream * normal).sum(dim=0).to(weight.dtype)


def rotate(t: Tensor, angles: Tensor, interleaved: bool, sign: float = 1.0) -> Tensor:
    """Rotary embedding of the first `angles.shape[-1]` channels; `sign` -1 is its transpose.

    Args:
        t: `[..., head_dim]`.
        angles: float32, `[..., rotated]` as t needs it to be broadcast.
        interleaved: pairs of neighbours are rotated, else of halves.
    """
    turned, rest = t.float().split([angles.shape[-1], t.shape[-1] - angles.shape[-1]], dim=-1)
    if interleaved:
        partner = torch.stack([-turned[..., 1::2], turned[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turned.chunk(2, dim=-1)
        partner = torch.cat([-second, first], dim=-1)
    return torch.cat([turned * angles.cos() + sign * partner * angles.sin(), rest], -1).to(t.dtype)


def product(
    a: Tensor, transpose_a: bool, b: Tensor, transpose_b: bool, bias: Tensor | None
) -> Tensor:
    """`b @ a` of the row-major matrices, either transposed; cuBLAS has them column by column."""
    right = a.t() if transpose_a else a
    left = b.t() if transpose_b else b
    return F.linear(left, right.t(), bias)
