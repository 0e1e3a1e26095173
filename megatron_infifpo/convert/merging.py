"""Models of one origin into one, a tensor at a time: the formulas, on plain tensors.

    theta_0     the base: the pivot that all models were trained from
    theta_j     the models, j = 1..M;  d_j = theta_j - theta_0

A tensor is one of a Hugging Face folder, such as the query projection of one layer: SCE and VaRM
weigh the models anew in each. Weights of any float type are computed with in float32, or in float64
where they are that, in blocks, so that beside the result memory holds little more than is given.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor

from megatron_infifpo.options import Option, declared

_BLOCK = 1 << 18  # elements: a few of them stay in a processor's cache


def sce(
    base: Tensor,
    targets: Sequence[Tensor] | Tensor,
    *,
    select_top: Annotated[
        float,
        Option("share of a tensor's elements, those that differ most between models", "(0, 1]"),
    ] = 0.1,
    select: Annotated[
        str,
        Option(
            "deltas: what is selected is merged; weights: it says what the models weigh, and all "
            "elements are merged, as in the code that FuseChat-7B was published with",
            choices=("deltas", "weights"),
        ),
    ] = "deltas",
) -> Tensor:
    """Select, calculate, erase (FuseChat, arXiv 2408.07990).

    The k = int(select_top * n) elements of the largest variance over the models are selected, of
    the n with any; w_j is proportional to the mean square of d_j over the tensor, with 0 where it
    is not selected; of each element the sign of sum_j d_j wins (a sum of 0 counts as plus), and
    models of another sign, or without a change, are left out:

        theta_0 + sum_j w_j d_j / sum_j w_j, over those that are left; theta_0 where none is

    Where no model has a selected change, all have equal weights. One model is returned as it is.

    Args:
        base: theta_0 `[*]`.
        targets: theta_j `[M, *]`, or M tensors `[*]`.
        select_top: share in (0, 1].
        select: "deltas": d_j is 0 where it is not selected; "weights": it is for w_j alone.
    """
    if len(targets) == 1:
        return targets[0].to(_kind(base), copy=True)
    chosen = None if select_top == 1 else _most_varied(base, targets, select_top)
    weights = _weights(base, targets, chosen)
    merged = base.new_empty(base.shape, dtype=_kind(base))
    for part, origin, deltas in _blocks(base, targets):
        if chosen is not None and select == "deltas":
            deltas *= chosen[part]
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        left = weights[:, None] * (deltas.sign() == sign)
        total = left.sum(0)
        change = (deltas * left).sum(0) / total.masked_fill(total == 0, 1)
        merged.view(-1)[part] = origin + change
    return merged


def varm(base: Tensor, targets: Sequence[Tensor] | Tensor) -> Tensor:
    """Variation-ratio merging (FuseChat, arXiv 2402.16107): theta_0 + sum_j w_j d_j.

    w_j is proportional to the mean square of d_j over the tensor. One model is returned as it is.

    Args:
        base: theta_0 `[*]`.
        targets: theta_j `[M, *]`, or M tensors `[*]`.
    """
    if len(targets) == 1:
        return targets[0].to(_kind(base), copy=True)
    weights = _weights(base, targets)
    merged = base.new_empty(base.shape, dtype=_kind(base))
    for part, origin, deltas in _blocks(base, targets):
        merged.view(-1)[part] = origin + (weights[:, None] * deltas).sum(0)
    return merged


def linear(targets: Sequence[Tensor] | Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """The weighted mean: sum_j w_j theta_j / sum_j w_j. One model is returned as it is.

    Args:
        targets: theta_j `[M, *]`, or M tensors `[*]`.
        weights: w_j, whose sum is not 0; default: all equal.
    """
    kind = _kind(targets[0])
    if len(targets) == 1:
        return targets[0].to(kind, copy=True)
    factors = _given(weights, targets)
    merged = targets[0].new_zeros(targets[0].shape, dtype=kind)
    for target, factor in zip(targets, factors, strict=True):
        merged.addcmul_(target.to(kind), factor)
    return merged.div_(factors.sum())


def task_arithmetic(
    base: Tensor,
    targets: Sequence[Tensor] | Tensor,
    weights: Sequence[float] | None = None,
    *,
    scale: Annotated[float, Option("factor of the sum of all changes", "(-inf, inf)")] = 1.0,
) -> Tensor:
    """Task arithmetic (arXiv 2212.04089): theta_0 + scale * sum_j w_j d_j.

    Args:
        base: theta_0 `[*]`.
        targets: theta_j `[M, *]`, or M tensors `[*]`.
        weights: w_j; default: 1 each.
        scale: of the sum.
    """
    factors = _given(weights, targets)
    merged = base.new_empty(base.shape, dtype=_kind(base))
    for part, origin, deltas in _blocks(base, targets):
        merged.view(-1)[part] = origin + (factors[:, None] * deltas).sum(0) * scale
    return merged


# By --method. A method says by its parameters whether it needs the base, and takes weights.
MERGES: dict[str, Callable[..., Tensor]] = {
    "sce": sce,
    "varm": varm,
    "linear": linear,
    "task-arithmetic": task_arithmetic,
}


def parameters(method: str) -> Mapping[str, inspect.Parameter]:
    """What a method takes, by name."""
    return inspect.signature(MERGES[method]).parameters


def all_options() -> dict[str, dict[str, Option]]:
    """The options of all methods, by name, and then by the methods that have it."""
    found: dict[str, dict[str, Option]] = {}
    for method, function in MERGES.items():
        for name, option in declared(function).items():
            found.setdefault(name, {})[method] = option
    return found


def _kind(tensor: Tensor) -> torch.dtype:
    """What is computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _given(weights: Sequence[float] | None, targets: Sequence[Tensor] | Tensor) -> Tensor:
    """The weights that the caller gives `[M]`; default: 1 each."""
    given = [1.0] * len(targets) if weights is None else weights
    if len(given) != len(targets):
        raise ValueError(f"{len(given)} weights for {len(targets)} models, expected one each")
    return targets[0].new_tensor(given, dtype=_kind(targets[0]))


def _blocks(
    base: Tensor, targets: Sequence[Tensor] | Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of a tensor: where in it, the base `[n]`, and the changes `[M, n]`, to be used up."""
    kind, flat = _kind(base), [target.reshape(-1) for target in targets]
    for start in range(0, base.numel(), _BLOCK):
        part = slice(start, start + _BLOCK)
        origin = base.reshape(-1)[part].to(kind)
        yield part, origin, torch.stack([target[part].to(kind) for target in flat]).sub_(origin)


def _most_varied(base: Tensor, targets: Sequence[Tensor] | Tensor, share: float) -> Tensor:
    """Which elements vary most between models, bool `[N]`."""
    variance = base.new_empty(base.numel(), dtype=_kind(base))
    for part, _, deltas in _blocks(base, targets):
        # In float64 the result is that of torch.var, bit for bit but 25 times as fast.
        wide = deltas.double()
        variance[part] = wide.sub_(wide.mean(0)).square_().mean(0)
    chosen = base.new_zeros(base.numel(), dtype=torch.bool)
    if count := int(torch.count_nonzero(variance) * share):
        chosen[variance.topk(count, sorted=False).indices] = True
    return chosen


def _weights(
    base: Tensor, targets: Sequence[Tensor] | Tensor, chosen: Tensor | None = None
) -> Tensor:
    """Weights `[M]` by the models' mean squared changes, in what is `chosen` of a tensor."""
    squares, means = base.new_empty(base.numel(), dtype=_kind(base)), []
    for target in targets:
        for part, _, (deltas,) in _blocks(base, [target]):
            squares[part] = (deltas if chosen is None else deltas.mul_(chosen[part])).square_()
        # As two equal rows: of one, torch would add up parts on several threads, and the last bit
        # would depend on how many there are.
        means.append(squares.expand(2, -1).mean(1)[0])
    weights = torch.stack(means)
    total = weights.sum()
    return weights / total if total else torch.full_like(weights, 1 / len(means))
