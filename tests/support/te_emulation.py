"""Transformer Engine on a CPU: its real Python, of which only the compiled part is stood in for.

The wheel `transformer-engine` holds Python alone. `load` imports it from a folder with a module in
place of the compiled `transformer_engine_torch`: its matrix product, RMSNorm, rotary embedding and
Adam are plain PyTorch, and everything else that is called raises. TE's own attention, which chooses
between several libraries, is replaced as a whole by what those document; every call is bound to its
real signature. One tensor-parallel rank only.

Order: `load`, then `megatron_infifpo.patches.cpu.enable()`, then Megatron.
"""

import collections
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from support import reference_kernels as kernels
from support import te_optimizer_kernels

CALLS: collections.Counter[str] = collections.Counter()
"""How often each emulated kernel ran."""


class _Names(type):
    """A compiled enumeration: every name that is asked for becomes the next member."""

    members: dict[str, Any]

    @property
    def __members__(cls) -> dict[str, Any]:
        """Under the name that Transformer Engine's constants ask for."""
        return cls.members

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        member = cls.members[name] = cls(len(cls.members))
        setattr(cls, name, member)
        return member


class _Extension(ModuleType):
    """Stands for the compiled `transformer_engine_torch`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Names(name, (int,), {"members": {}}) if name[0].isupper() else _missing(name)
        setattr(self, name, value)
        return value


def _missing(name: str) -> Any:
    def kernel(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"Transformer Engine's kernel {name} is not emulated")

    return kernel


def generic_gemm(
    a: Tensor,
    transpose_a: bool,
    b: Tensor,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: None,
    out_dtype: Any,
    bias: Tensor | None,
    bias_dtype: Any,
    gelu: bool,
    gelu_in: None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    *,
    comm_overlap: None = None,
    comm_type: None = None,
    extra_output: None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float = 0.0,
) -> tuple[Tensor, Tensor | None, None, None]:
    """Product of two matrices of one type; where `grad`, also the gradient of a bias."""
    from transformer_engine.pytorch.constants import TE_DType

    CALLS["gemm"] += 1
    assert quantizer is None and not gelu and comm_overlap is None and extra_output is None
    assert a.dtype == b.dtype and alpha == 1.0 and beta == float(accumulate)
    rows = b.reshape(-1, b.shape[-1])
    columns = a.reshape(-1, a.shape[-1])
    result = kernels.product(columns, transpose_a, rows, transpose_b, None if grad else bias)
    if not transpose_b:
        result = result.view(*b.shape[:-1], -1)
    bias_grad = rows.sum(dim=0) if grad and bias is not None else None
    if out is not None:
        CALLS["gemm into a buffer"] += 1  # Megatron's gradients, in their own type
        out.add_(result) if accumulate else out.copy_(result)
        return out, bias_grad, None, None
    assert not accumulate
    dtype = next(key for key, value in TE_DType.items() if value == out_dtype)
    return result.to(dtype), bias_grad, None, None


def te_general_grouped_gemm(
    a: list[Tensor],
    transpose_a: bool,
    b: list[Tensor],
    transpose_b: bool,
    out: list[Tensor],
    out_dtype: Any,
    splits: list[int] | None,
    bias: list[Tensor],
    bias_dtype: Any,
    single_output: bool,
    gelu_in: list[Tensor],
    grad: bool,
    workspaces: list[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    multiprocessors: int,
) -> list[Tensor]:
    """Products of pairs of matrices, each into its own tensor or into its rows of one.

    With biases, or where `grad` with their gradients, into what is given for them.
    """
    CALLS["grouped gemm"] += 1
    assert not any(tensor.numel() for tensor in gelu_in)
    if single_output:
        assert splits is not None and len(out) == 1
        out = list(out[0].split(list(splits)))
    for left, right, target, own in zip(a, b, out, bias, strict=True):
        assert left.dtype == right.dtype
        rows = right.reshape(-1, right.shape[-1])
        added = own if own.numel() and not grad else None
        result = kernels.product(left, transpose_a, rows, transpose_b, added)
        target.add_(result) if accumulate else target.copy_(result)
        if own.numel() and grad:
            own.copy_(rows.sum(dim=0))
    return bias


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: None,
    out_dtype: Any,
    sm_margin: int,
    zero_centered: bool,
) -> tuple[Tensor, None, Tensor]:
    """Normalise rows; the middle of the result is the mean, which this norm has none of."""
    CALLS["norm"] += 1
    assert out is None and quantizer is None and x.dim() == 2
    y, inverse = kernels.rms_norm(x, weight, eps, zero_centered)
    return y, None, inverse


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse: Tensor, weight: Tensor, sm_margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and of the weight."""
    return kernels.rms_norm_gradients(grad, x, inverse, weight, zero_centered)


def _rope(sign: float) -> Any:
    def kernel(
        t: Tensor,
        angles: Tensor,
        start_positions: None,
        qkv_format: Any,
        interleaved: bool,
        borders: Tensor | None,
        cp_size: int,
        cp_rank: int,
    ) -> Tensor:
        from transformer_engine.pytorch.cpp_extensions.fused_attn import QKVFormat

        CALLS["rope"] += 1
        assert start_positions is None and cp_size == 1 and angles.dtype == torch.float32
        if qkv_format == QKVFormat["sbhd"]:
            assert borders is None and t.dim() == 4 and len(angles) >= len(t)
            return kernels.rotate(t, angles[: len(t)], interleaved, sign)
        assert qkv_format == QKVFormat["thd"] and t.dim() == 3
        assert borders is not None and borders.dtype == torch.int32
        lengths = borders.diff()
        assert int(lengths.max()) <= len(angles)
        counts = torch.cat([torch.arange(int(length)) for length in lengths])
        return kernels.rotate(t, angles.squeeze(1)[counts], interleaved, sign)

    return kernel


IS_CUDA: Any = torch.Tensor.is_cuda


class _SaysCuda(TorchFunctionMode):
    """A tensor's `is_cuda`, which TE's modules ask of their input, is true."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == IS_CUDA.__get__:
            return True
        return func(*args, **(kwargs or {}))


def _replace_attention(te: ModuleType) -> None:
    signature = inspect.signature(te.DotProductAttention.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        call = dict(signature.bind(self, *args, **kwargs).arguments)
        CALLS["attention"] += 1
        query, borders = call["query_layer"], (call["cu_seqlens_q"], call["cu_seqlens_kv"])
        assert call["qkv_format"] == "thd" and query.dim() == 3
        assert call["attn_mask_type"] == "padding_causal"
        for border, longest in zip(borders, ("max_seqlen_q", "max_seqlen_kv"), strict=True):
            assert border.dtype == torch.int32 and border.is_contiguous()
            assert type(call[longest]) is int and call[longest] >= int(border.diff().max())
        window = call.get("window_size") or self.window_size
        left = -1 if window is None else window[0]
        scale = getattr(self, "softmax_scale", None) or self.unfused_attention.softmax_scale
        key, value = call["key_layer"], call["value_layer"]
        output, lse = kernels.varlen_attention(
            query, key, value, *borders, scale=scale, window=(left, 0)
        )
        if self.softmax_type == "learnable":
            share = (lse - self.softmax_offset.flatten()[:, None]).sigmoid()
            output = output * share.mT[..., None]
        return output.flatten(1)

    te.DotProductAttention.forward = forward


def _dummy_gradient(shape: list[int], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """What goes to autograd where the gradient is in Megatron's buffer: of no use to anybody."""
    value = 0.0 if zero else torch.nan
    return torch.full(shape, value, dtype=dtype, device=torch.cuda.current_device())


class _TorchOnHost:
    """PyTorch, with empty tensors for CUDA on the host."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def empty(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.empty(*size, **options)


def _replace_cuda() -> None:
    """Replace what asks for CUDA where the CPU stand-ins are not heard, as in backward passes."""
    from transformer_engine.pytorch import utils
    from transformer_engine.pytorch.cpp_extensions import gemm
    from transformer_engine.pytorch.module import base, layernorm_linear, linear

    prepare = base.TransformerEngineBaseModule.prepare_forward

    def prepare_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with _SaysCuda():
            return prepare(self, *args, **kwargs)

    base.TransformerEngineBaseModule.prepare_forward = prepare_forward
    for module in (base, linear, layernorm_linear):
        module.get_dummy_wgrad = _dummy_gradient
    gemm.torch = _TorchOnHost()
    utils._empty_tensor = lambda: torch.empty(0, device=torch.cuda.current_device())
    torch.cuda.is_current_stream_capturing = lambda: False


def _replace_extension() -> None:
    extension: Any = _Extension("transformer_engine_torch")
    extension.__path__ = []
    products = (generic_gemm, te_general_grouped_gemm)
    for kernel in (*products, rmsnorm_fwd, rmsnorm_bwd, *te_optimizer_kernels.KERNELS):
        setattr(extension, kernel.__name__, kernel)
    extension.get_num_cublas_streams = lambda: 4
    extension.fused_rope_forward, extension.fused_rope_backward = _rope(1.0), _rope(-1.0)
    extension.get_cudnn_version = lambda: 92000
    for name in ("layernorm_fwd", "layernorm_bwd"):  # found by `import *` only if they are there
        setattr(extension, name, _missing(name))
    sys.modules["transformer_engine_torch"] = extension
    # Of the wheel, but needs a package for exports to ONNX.
    exports = "transformer_engine.pytorch.onnx_extensions"
    sys.modules[exports] = _Extension(exports)


def load(folder: Path) -> ModuleType:
    """Import Transformer Engine from a folder that pip has put its wheel into.

    Returns:
        The module `transformer_engine.pytorch`.
    """
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it would look for its compiled libraries
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    sys.path.insert(0, str(folder))
    _replace_extension()
    # The package imports its PyTorch part at once, and that the compiled module: replace the
    # function that loads it in between.
    spec = importlib.util.find_spec("transformer_engine")
    assert spec is not None and spec.loader is not None, f"no Transformer Engine in {folder}"
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    spec.loader.exec_module(package)
    import transformer_engine.pytorch as te

    _replace_cuda()
    _replace_attention(te)
    return te
