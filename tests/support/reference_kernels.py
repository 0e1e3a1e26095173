"""What CUDA kernels compute, as their documentation has it, in plain PyTorch."""

from collections.abc import Iterator

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
) -> tuple[Tensor, Tensor]:
    """Flash attention over segments: causality and windows count from the bottom right corner.

    Args:
        query: `[T, heads, head_dim]`; `key` and `value`: `[T_kv, groups, head_dim]`.
        query_borders, key_borders: int32 `[S + 1]`.
        scale: of the products; by default 1 / sqrt(head_dim).
        window: how many keys to the left and to the right of its own a query sees; -1: all.

    Returns:
        Outputs `[T, heads, head_dim]`, and the log-sum-exp of every query's scores `[heads, T]`.
    """
    outputs, sums = [], []
    options = (query_borders, key_borders, scale, window)
    for _, _, v, _, scores in _segments(query, key, value, *options):
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), v))
        sums.append(scores.logsumexp(dim=-1))
    return torch.cat(outputs), torch.cat(sums, dim=1)


def _segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    scale: float | None,
    window: tuple[int, int],
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Rows of queries and of keys, the values and keys of every head, masked scores, by segment."""
    left, right = window
    scale = query.shape[-1] ** -0.5 if scale is None else scale
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
        yield rows, columns, v, k, scores.masked_fill(~seen, -torch.inf)


def varlen_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_borders: Tensor,
    key_borders: Tensor,
    *,
    scale: float | None = None,
    window: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor, Tensor]:
    """Flash attention's backward pass (arXiv 2307.08691, algorithm 2) of query, key and value.

    Probabilities are made again of `lse`, and the products of rows of `grad` and `out` are taken
    for what the softmax's own gradient needs.
    """
    groups, gradients = key.shape[1], [torch.zeros_like(x) for x in (query, key, value)]
    options = (query_borders, key_borders, scale, window)
    for rows, columns, v, k, scores in _segments(query, key, value, *options):
        upstream = grad[rows]
        shares = (scores - lse[:, rows, None]).exp()
        products = (upstream * out[rows]).sum(-1).mT[..., None]
        of_scores = shares * (torch.einsum("qhd,khd->hqk", upstream, v) - products)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        gradients[0][rows] += torch.einsum("hqk,khd->qhd", of_scores, k) * factor
        of_keys = torch.einsum("hqk,qhd->khd", of_scores, query[rows]) * factor
        of_values = torch.einsum("hqk,qhd->khd", shares, upstream)
        for gradient, whole in zip(gradients[1:], (of_keys, of_values), strict=True):
            gradient[columns] += whole.unflatten(1, (groups, -1)).sum(2)
    return gradients[0], gradients[1], gradients[2]


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
