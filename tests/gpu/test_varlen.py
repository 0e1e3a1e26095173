"""Packed attention's CUDA kernel, by what PyTorch documents of it, against the CPU's path."""

import functools
import inspect
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.attention.varlen as varlen

import megatron_infifpo.engine.layers as layers
from megatron_infifpo.engine.packed import row_params
from megatron_infifpo.engine.sinks import SinkAttention
from megatron_infifpo.errors import UserError
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.pieces import cut
from megatron_infifpo.rows.preference_dataset import PreferencePair
from support import reference_kernels

HEADS, GROUPS, SIZE = 4, 2, 16
SIGNATURE = inspect.signature(varlen.varlen_attn)


def flash(*args, **kwargs) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The kernel in float64, with what it asks of its arguments; also where the CPU is too kind."""
    bound = SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    call = SimpleNamespace(**bound.arguments)
    tensors = (call.query, call.key, call.value)
    for border, rows, longest in (
        (call.cu_seq_q, len(call.query), call.max_q),
        (call.cu_seq_k, len(call.key), call.max_k),
    ):
        assert border.dtype == torch.int32 and border.is_contiguous()
        assert border[0] == 0 and border[-1] == rows
        assert type(longest) is int and longest == int(border.diff().max())
    assert call.cu_seq_q.shape == call.cu_seq_k.shape
    assert all(x.stride(-1) == 1 for x in tensors) and len({x.dtype for x in tensors}) == 1
    assert call.query.shape[-1] % 8 == 0 and call.query.shape[-1] <= 256
    assert call.enable_gqa or call.query.shape[1] == call.key.shape[1]
    assert call.seqused_k is None and call.block_table is None
    out, lse = reference_kernels.varlen_attention(
        *tensors, call.cu_seq_q, call.cu_seq_k, scale=call.scale, window=call.window_size
    )
    return (out, lse) if call.return_aux is not None and call.return_aux.lse else out


@pytest.fixture
def kernel_calls(monkeypatch) -> list[None]:
    """Put the kernel's stand-in in its place; grows with every call."""
    calls: list[None] = []

    @functools.wraps(varlen.varlen_attn)
    def counted(*args, **kwargs):
        calls.append(None)
        return flash(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    return calls


def attention(
    window: int | None, scale: float | None, sinks: bool = False
) -> layers.PackedAttention:
    config = SimpleNamespace(
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
        window_attn_skip_freq=None,
        context_parallel_size=1,
        softmax_type="learnable" if sinks else "vanilla",
        num_attention_heads=HEADS,
        params_dtype=torch.float64,
    )
    if not sinks:
        return layers.PackedAttention(config, 1, None, "self", softmax_scale=scale)
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    with mock.patch("torch.cuda.current_device", lambda: "cpu"):
        module = SinkAttention(config, 1, None, "self", softmax_scale=scale, pg_collection=groups)
    values = torch.randn(HEADS, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    module.softmax_offset = torch.nn.Parameter(values)
    return module


def random_row(rng: np.random.Generator, shared: bool) -> dict:
    """Pairs of responses and prompts of 1 to 11 tokens, perhaps with a tail of padding."""

    def ids(most: int) -> np.ndarray:
        return rng.integers(0, 50, rng.integers(1, most))

    responses = int(rng.integers(2, 4))
    pairs = [
        PreferencePair(i, ids(12), tuple(ids(9) for _ in range(responses)))
        for i in range(rng.integers(1, 4))
    ]
    return collate(pairs, RowLayout(int(rng.choice([1, 4, 8])), share_prompt=shared))


def outputs(module, row: dict, seed: int, groups: int = GROUPS) -> list[torch.Tensor]:
    """Output and gradients of queries, keys, values, and of sinks."""
    generator = torch.Generator().manual_seed(seed)
    tokens = row["tokens"].shape[1]
    # As Megatron hands them over: views of the joint projection, strided.
    joint = torch.randn(
        tokens, 1, HEADS + 2 * groups, SIZE, generator=generator, dtype=torch.float64
    ).requires_grad_()
    query, key, value = joint.split([HEADS, groups, groups], dim=2)
    out = module(query, key, value, packed_seq_params=row_params(row))
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    return [out, *torch.autograd.grad((out * weights).sum(), [joint, *module.parameters()])]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 0, 3, 9])
def test_kernel(kernel_calls, monkeypatch, window, shared, groups):
    rng = np.random.default_rng([groups, shared, window or 50])
    worst = 0.0
    for trial in range(8):
        row = random_row(rng, shared)
        module = attention(window, [None, 0.3][trial % 2])
        monkeypatch.setattr(layers, "_flash_takes", lambda query: False)
        expected = outputs(module, row, trial, groups)
        assert len(kernel_calls) == trial
        monkeypatch.setattr(layers, "_flash_takes", lambda query: True)
        got = outputs(module, row, trial, groups)
        assert len(kernel_calls) == trial + 1
        differences = [(a - b).abs().max() for a, b in zip(expected, got, strict=True)]
        worst = max(worst, float(max(differences)))
    assert worst < 1e-12


def backward(grad, query, key, value, out, lse, cu_q, cu_k, max_q, max_k, causal, *rest):
    """The kernel's backward pass, as PyTorch's own calls it."""
    _, scale, (left, right) = rest
    assert grad.is_contiguous() and causal == (left < 0)
    return reference_kernels.varlen_gradients(
        grad, query, key, value, out, lse, cu_q, cu_k, scale=scale, window=(left, right)
    )


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 0, 3])
def test_sinks(kernel_calls, monkeypatch, window, shared, groups):
    """The kernel scaled, forward and backward, against a softmax with one more column."""
    monkeypatch.setattr(torch.ops.torch_attn, "_varlen_attn_backward", backward)
    rng = np.random.default_rng([groups, shared, window or 50])
    for trial in range(8):
        row, scale = random_row(rng, shared), [None, 0.3][trial % 2]
        module = attention(window, scale, sinks=True)
        monkeypatch.setattr(layers, "_flash_takes", lambda query: False)
        expected = outputs(module, row, trial, groups)
        monkeypatch.setattr(layers, "_flash_takes", lambda query: True)
        got = outputs(module, row, trial, groups)
        assert len(kernel_calls) == trial + 1 and len(got) == 3
        for a, b in zip(expected, got, strict=True):
            assert (a - b).abs().max() < 1e-12
        (without, *_) = outputs(attention(window, scale), row, trial, groups)
        kernel_calls.pop()
        assert (without - got[0]).abs().max() > 1e-3


def test_the_kernels_backward_takes_what_it_is_given():
    schema = torch.ops.torch_attn._varlen_attn_backward.default._schema
    names = "grad_out query key value out lse cu_seq_q cu_seq_k max_q max_k is_causal rng_state"
    assert [x.name for x in schema.arguments] == [*names.split(), "scale", "window_size"]


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 0, 3, 9])
def test_blocks_of_queries(monkeypatch, window, shared, sinks):
    """What large masks are cut into: the same as one mask a segment."""
    rng = np.random.default_rng([shared, window or 50])
    for trial in range(8):
        row, module = random_row(rng, shared), attention(window, None, sinks)
        expected = outputs(module, row, trial)
        for elements in (1, 40):
            monkeypatch.setattr(layers, "MASK_ELEMENTS", elements)
            for a, b in zip(outputs(module, row, trial), expected, strict=True):
                assert (a - b).abs().max() < 1e-12
        monkeypatch.undo()


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ranks", [2, 3])
def test_pieces_of_ranks(kernel_calls, monkeypatch, ranks, window, shared, flash):
    """Each rank's queries see in the joined keys what they see in the whole row."""
    texts = iter(np.split(np.arange(1, 121), [7, 20, 26, 31, 60, 64]))
    pairs = [PreferencePair(i, next(texts), (next(texts), next(texts))) for i in range(2)]
    row = collate(pairs, RowLayout(share_prompt=shared, context_parallel=ranks))
    module, tokens = attention(window, None), row["tokens"].numel()
    joint = torch.randn(tokens, 1, HEADS + 2 * GROUPS, SIZE, dtype=torch.float64)
    expected = module(*joint.split([HEADS, GROUPS, GROUPS], 2), packed_seq_params=row_params(row))
    parts = [cut(row | {"tokens": torch.arange(tokens)[None]}, ranks, r) for r in range(ranks)]
    order = torch.cat([part["tokens"].flatten() for part in parts])
    _, key, value = joint[order].split([HEADS, GROUPS, GROUPS], 2)
    monkeypatch.setattr(layers, "_flash_takes", lambda query: flash)
    for part in parts:
        own = part["tokens"].flatten()
        out = module(joint[own, :, :HEADS], key, value, packed_seq_params=row_params(part))
        assert (out - expected[own]).abs().max() < 1e-12
    assert len(kernel_calls) == ranks * flash


@pytest.mark.parametrize(
    ("dtype", "size", "kernel"),
    [
        (torch.bfloat16, 64, True),
        (torch.float16, 256, True),
        (torch.bfloat16, 72, True),
        (torch.float32, 64, False),  # the kernel takes halves only
        (torch.float64, 64, False),
        (torch.bfloat16, 60, False),
        (torch.bfloat16, 264, False),
    ],
)
def test_what_the_kernel_takes(dtype, size, kernel):
    """On a GPU, for which `meta` stands; on a CPU it takes nothing."""
    assert layers._flash_takes(torch.empty(3, 2, size, dtype=dtype, device="meta")) == kernel
    assert not layers._flash_takes(torch.empty(3, 2, size, dtype=dtype))


def test_an_older_pytorch_is_refused(monkeypatch):
    """2.11 has the kernel without grouped heads, which would end in a TypeError."""

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        raise AssertionError("not called")

    monkeypatch.setattr(varlen, "varlen_attn", older)
    layers.check_flash_kernel.cache_clear()
    with pytest.raises(UserError, match="no enable_gqa: expected torch >= 2.12"):
        layers.check_flash_kernel()
    monkeypatch.undo()
    layers.check_flash_kernel()
