"""Group 2: packed attention against float64, forward and backward.

The reference is a plain product with a mask, segment by segment, in float64. What the data type
explains is measured: the same plain product in it. The kernel may err by `FACTOR` times as much,
as flash attention's own tests allow.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_infifpo.engine.layers import PackedAttention
from megatron_infifpo.engine.packed import RowParams, row_params, to_device
from megatron_infifpo.engine.sinks import SinkAttention
from megatron_infifpo.gpu_check.records import Options, Recorder, Result
from megatron_infifpo.gpu_check.rows import random_pairs
from megatron_infifpo.patches import cpu
from megatron_infifpo.rows import Row
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate

FACTOR = 3.0
HEADS = 8
SIZES = (64, 96, 128, 256)
# Tokens of prompts, and of their responses; one of one token.
PAIRS = ((37, (90, 1)), (150, (64, 33)), (1, (7, 260)))
INPUTS = ("q", "k", "v", "sinks")
WINDOW = 5  # small, so that one token too many shows in bfloat16


@dataclass(frozen=True)
class Case:
    """One variant of a row's attention."""

    size: int
    shared: bool
    window: bool
    groups: int
    dtype: torch.dtype
    sinks: bool = False

    def __str__(self) -> str:
        """Say it in a few words."""
        prompts = "shared prompts" if self.shared else "own prompts"
        window = ", window" if self.window else ""
        return f"{prompts}{window}, {HEADS} heads on {self.groups} keys"


def check(options: Options, record: Recorder) -> None:
    """Check every head size in bfloat16, one in float32, and one with sinks."""
    if not options.cuda:
        cpu.enable(announce=False)
    sizes = SIZES if options.cuda or not options.quick else SIZES[:2]
    plans = [(size, torch.bfloat16, False) for size in sizes]
    plans += [(SIZES[0], torch.float32, False), (SIZES[0], torch.bfloat16, True)]
    for size, dtype, sinks in plans:
        cases = [
            Case(size, shared, window, groups, dtype, sinks)
            for shared, window, groups in itertools.product(
                (True, False), (False, True), (2,) if options.quick else (2, HEADS)
            )
        ]
        name = f"{str(dtype).removeprefix('torch.')}, head size {size}{', sinks' if sinks else ''}"
        backward, again = Result(), Result(0.0, 0.0)
        with record.check(f"{name}, forward", unit="relative") as forward:
            for case in cases:
                errors, limits, difference = compare(case, options.device)
                forward.worst(errors[0], limits[0], str(case))
                for error, limit, tensor in zip(errors[1:], limits[1:], INPUTS, strict=False):
                    backward.worst(error, limit, f"{tensor}: {case}")
                again.value = max(again.value or 0.0, difference)
        record.result(f"{name}, gradients", backward, unit="relative")
        record.result(f"{name}, forward again", again, unit="relative")
    check_efficient_kernel(options, record)


def check_efficient_kernel(options: Options, record: Recorder) -> None:
    """See that float32 needs no kernel that holds the scores of a whole segment."""
    name = "float32 by the memory-efficient kernel alone"
    if not options.cuda:
        record.skip(name, "it is one for GPUs")
        return
    with record.check(name, unit="relative") as result:
        for shared, window in itertools.product((True, False), (False, True)):
            case = Case(SIZES[0], shared, window, 2, torch.float32)
            with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
                errors, limits, _ = compare(case, options.device)
            result.worst(errors[0], limits[0], str(case))


def make_row(shared: bool) -> Row:
    """Collate a row with segments of one token and a tail of one, as training does."""
    pairs = random_pairs(PAIRS, 50)
    total = collate(pairs, RowLayout(share_prompt=shared))["tokens"].numel()
    return collate(pairs, RowLayout(total + 1, share_prompt=shared))


def compare(case: Case, device: str) -> tuple[list[float], list[float], float]:
    """Run a case twice.

    Returns:
        Errors of output, dq, dk, dv and where there are sinks theirs, relative to the largest
        value; their limits; and how far the second output is from the first.
    """
    row = make_row(case.shared)
    if device == "cuda":
        row = to_device(row)
    params = row_params(row)
    generator = torch.Generator().manual_seed(case.size)
    tokens = row["tokens"].numel()

    def random(heads: int) -> Tensor:
        values = torch.randn(tokens, 1, heads, case.size, generator=generator, dtype=torch.float64)
        return values.to(device, case.dtype)

    inputs = [random(HEADS), random(case.groups), random(case.groups)]
    if case.sinks:
        inputs.append(random(HEADS)[0, 0, :, 0])
    upstream = random(HEADS).flatten(2)
    attention = make_attention(case)

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        output = function(*leaves)
        gradients = torch.autograd.grad(output, leaves, upstream.to(dtype))
        return [output.detach().double(), *(x.double() for x in gradients)]

    def ours(*leaves: Tensor) -> Tensor:
        sinks = {"softmax_offset": leaves[3]} if case.sinks else {}
        options = {"packed_seq_params": params}
        output: Tensor = functional_call(attention, sinks, leaves[:3], options)
        return output

    def plain(*leaves: Tensor) -> Tensor:
        return reference(leaves, params, attention.window)

    exact, noisy = results(plain, torch.float64), results(plain, case.dtype)
    got, again = results(ours, case.dtype), results(ours, case.dtype)[0]
    scales = [float(x.abs().max()) for x in exact]

    def errors(found: list[Tensor]) -> list[float]:
        return [
            float((a - b).abs().max()) / scale
            for a, b, scale in zip(found, exact, scales, strict=True)
        ]

    least = torch.finfo(case.dtype).eps
    limits = [FACTOR * error + least for error in errors(noisy)]
    return errors(got), limits, float((got[0] - again).abs().max()) / scales[0]


def make_attention(case: Case) -> PackedAttention:
    """Build the module as a model does."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * case.size,
        num_attention_heads=HEADS,
        num_query_groups=case.groups,
        kv_channels=case.size,
        attention_dropout=0.0,
        window_size=(WINDOW, 0) if case.window else None,
        softmax_type="learnable" if case.sinks else "vanilla",
    )
    alone = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))  # as of a model on one rank
    kind = SinkAttention if case.sinks else PackedAttention
    return kind(config, 1, AttnMaskType.causal, "self", pg_collection=alone)


def reference(inputs: Sequence[Tensor], row: RowParams, window: int) -> Tensor:
    """Attention segment by segment, in the data type of the inputs; see `PackedAttention`.

    Args:
        inputs: query, key and value `[T, 1, heads, head_dim]`, and sinks `[heads]` if any.
        row: where segments lie.
        window: tokens before itself that a token sees; -1: all.
    """
    query, key, value = (x.squeeze(1) for x in inputs[:3])
    if row.key_rows is not None:
        key, value = key[row.key_rows], value[row.key_rows]
    copies = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(copies, 1), value.repeat_interleave(copies, 1)
    outputs, first, first_key = [], 0, 0
    for queries, keys in zip(row.query_lengths, row.key_lengths, strict=True):
        q = query[first : first + queries]
        k, v = (x[first_key : first_key + keys] for x in (key, value))
        first, first_key = first + queries, first_key + keys
        scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        position = torch.arange(keys - queries, keys, device=q.device)[:, None]
        other = torch.arange(keys, device=q.device)[None]
        seen = other <= position
        if window >= 0:
            seen = seen & (other >= position - window)
        scores = scores.masked_fill(~seen, -torch.inf)
        if len(inputs) > 3:
            sinks = inputs[3].view(-1, 1, 1).expand(-1, queries, 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., :keys]
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v))
    return torch.cat(outputs).flatten(1).unsqueeze(1)
