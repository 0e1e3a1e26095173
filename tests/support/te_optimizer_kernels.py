"""Transformer Engine's kernels over lists of tensors, in plain PyTorch: see te_emulation.py.

Each takes the size of a chunk and an int32 flag of overflow first, which only GPUs need.
"""

from collections.abc import Sequence
from typing import Any

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


def multi_tensor_adam_param_remainder(
    chunk: int, overflow: Tensor, lists: Lists, *settings: Any
) -> None:
    """The same, where a float32 parameter is one in bfloat16 and the 16 bits that it lacks.

    The fourth list before the bits is of bfloat16 parameters, rounded up where the bits, taken for
    an int16, are below 0.
    """
    gradients, parameters, firsts, seconds, remainders = lists
    for each in zip(gradients, parameters, firsts, seconds, remainders, strict=True):
        gradient, parameter, first, second, bits = each
        assert parameter.dtype == torch.bfloat16 and bits.dtype == torch.int16
        high = parameter.view(torch.int16).int() - (bits < 0).int()
        whole = ((high << 16) | (bits.int() & 0xFFFF)).view(torch.float32)
        multi_tensor_adam(chunk, overflow, [[gradient], [whole], [first], [second]], *settings)
        found = whole.view(torch.int32)
        bits.copy_(found & 0xFFFF)
        parameter.view(torch.int16).copy_((found >> 16) + (bits < 0).int())


KERNELS = (
    multi_tensor_scale,
    multi_tensor_scale_tensor,
    multi_tensor_l2norm,
    multi_tensor_adam,
    multi_tensor_adam_param_remainder,
)
