"""Transformer Engine's kernels over lists of tensors, in plain PyTorch: see te_emulation.py.

Each takes the size of a chunk and an int32 flag of overflow first, which only GPUs need.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Lists = Sequence[Sequence[Tensor]]


def multi_tensor_scale(chunk: int, overflow: Tensor, lists: Lists, scale: float | Tensor) -> None:
    """Write scaled tensors of the first list into the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk: int, overflow: Tensor, lists: Lists, scale: Tensor) -> None:
    """The same by a factor that is on the device."""
    assert scale.numel() == 1
    multi_tensor_scale(chunk, overflow, lists, scale)


def multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Norm of all tensors together, float32 `[1]`."""
    assert not per_tensor
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().view(1), None


def multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW over gradients, parameters, first and second moments, all float32."""
    assert mode == 1 and bias_correction == 1 and isinstance(step, int)
    for gradient, parameter, first, second in zip(*lists, strict=True):
        assert gradient.dtype == parameter.dtype == first.dtype == second.dtype == torch.float32
        first.mul_(beta1).add_(gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        scale = (second / (1 - beta2**step)).sqrt_().add_(eps)
        update = (first / (1 - beta1**step)).div_(scale).add_(parameter, alpha=weight_decay)
        parameter.sub_(update, alpha=lr)


KERNELS = (multi_tensor_scale, multi_tensor_scale_tensor, multi_tensor_l2norm, multi_tensor_adam)
