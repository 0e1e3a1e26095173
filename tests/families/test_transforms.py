"""Layouts are invertible for any sizes, and are those that Megatron's attention and MLP expect."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_infifpo.families.transforms import FUSED_QKV, GATE_UP, IDENTITY, QKV, Dims


@st.composite
def all_dims(draw) -> Dims:
    groups = draw(st.integers(1, 5))
    return Dims(
        heads=groups * draw(st.integers(1, 4)),
        groups=groups,
        head_dim=draw(st.integers(1, 6)),
        hidden=draw(st.integers(1, 7)),
        ffn=draw(st.integers(1, 9)),
        vocab=draw(st.integers(1, 9)),
    )


def distinct(rows: int, *rest: int) -> torch.Tensor:
    return torch.arange(rows * max(1, torch.Size(rest).numel())).view(rows, *rest).float()


@settings(deadline=None, max_examples=100)
@given(all_dims(), st.booleans())
def test_round_trips(dims, bias):
    rest = () if bias else (dims.hidden,)
    for transform, rows in (
        (QKV, dims.qkv),
        (FUSED_QKV, dims.qkv),
        (GATE_UP, dims.gate_up),
        (IDENTITY, dims.hidden),
    ):
        whole = distinct(rows, *rest)
        parts = transform.to_hf(whole, dims)
        assert torch.equal(transform.to_megatron(parts, dims), whole)
        again = transform.to_hf(transform.to_megatron(parts, dims), dims)
        assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


@settings(deadline=None, max_examples=50)
@given(all_dims())
def test_shapes_follow_from_meta_tensors(dims):
    keys = dims.groups * dims.head_dim
    meta = torch.empty(dims.qkv, dims.hidden, device="meta")
    shapes = [list(part.shape) for part in QKV.to_hf(meta, dims)]
    assert shapes == [[dims.attention, dims.hidden], [keys, dims.hidden], [keys, dims.hidden]]


def test_a_group_holds_its_queries_then_its_key_then_its_value():
    dims = Dims(heads=4, groups=2, head_dim=1, hidden=1, ffn=1, vocab=1)
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert QKV.to_megatron([q, k, v], dims).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert FUSED_QKV.to_megatron([torch.cat([q, k, v])], dims).tolist() == [
        0, 1, 10, 20, 2, 3, 11, 21
    ]  # fmt: skip
