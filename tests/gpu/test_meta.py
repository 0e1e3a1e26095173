"""From hidden states to the loss on `meta`, which stands for CUDA: nothing is on the CPU.

A tensor there that has no data cannot be waited for either: `.item()`, `.cpu()`, a boolean mask as
an index, all raise.
"""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import megatron_infifpo.training.step as training_step
from megatron_infifpo.engine.layers import PackedAttention
from megatron_infifpo.engine.packed import row_params
from megatron_infifpo.logprobs import TopLogprobs, response_logprobs, vocab_parallel_logprobs
from megatron_infifpo.losses import LOSSES
from megatron_infifpo.methods import METHODS, Method, resolve
from megatron_infifpo.reference import FUSIONS, MARGIN_ANCHORS, MARGIN_SPACES, SELECTIONS
from megatron_infifpo.references.reference import PairValues
from megatron_infifpo.references.soft_targets import SoftTargets
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferencePair
from support.device_rules import CudaRules, NoConstants

META = torch.device("meta")
HALVES = (torch.bfloat16, torch.float16)
# An out= of a wrong shape is only warned of.
pytestmark = pytest.mark.filterwarnings("error:An output with one or more elements was resized")


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def strict():
    with CudaRules(), NoConstants():
        yield


def world() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def gradient(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=META).requires_grad_(grad)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x.index_select(0, torch.tensor([1])),
        lambda x: x @ torch.ones(4, 2),
        lambda x: x @ x.t().bfloat16(),
        lambda x: x + torch.ones(4),
        lambda x: x.new_tensor([1.0]),
        lambda x: torch.addmm(x.bfloat16(), x, x, out=x),
        lambda x: torch.mm(x, x, out_dtype=torch.bfloat16),
        lambda x: torch.mm(x, x, out=torch.empty(3, 4, device=META)),
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
    ],
)
def test_rules(mistake):
    """What the tests below would not survive."""
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError, UserWarning)):
        mistake(random(4, 4))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunks", [1, 5])
@pytest.mark.parametrize("main", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_head(dtype, main, chunks, tied):
    """K scored tokens in chunks; the gradient of the weight in Megatron's buffer or apart."""
    scored, size, vocab = 30, 16, 100
    hidden = random(scored, size, dtype=dtype, grad=True)
    weight: Any = torch.nn.Parameter(random(vocab + 28, size, dtype=dtype))
    weight.zero_out_wgrad = tied
    if main is not None:
        weight.main_grad = torch.zeros_like(weight, dtype=main)
    targets = torch.zeros(scored, dtype=torch.int64, device=META)
    logprobs = vocab_parallel_logprobs(
        hidden, weight, targets, vocab_size=vocab, group=world(),
        chunk_bytes=4 * vocab * scored // chunks,
    )  # fmt: skip
    assert logprobs.is_meta and logprobs.dtype == torch.float32
    logprobs.sum().backward()
    assert gradient(hidden).dtype == weight.grad.dtype == dtype
    assert getattr(weight, "grad_added_to_main_grad", False) == (main == torch.float32)


def test_output_processor():
    """Hidden states of a row to log-probs of its scored tokens, as Megatron's model calls it."""
    hidden = random(40, 1, 16, dtype=torch.bfloat16, grad=True)
    layer: Any = torch.nn.Linear(16, 100, bias=False, device=META, dtype=torch.bfloat16)
    layer.tp_group = world()
    indices = torch.zeros(12, dtype=torch.int64, device=META)
    context = {"scored_rows": indices, "target_ids": indices, "vocab_size": 90}
    config = SimpleNamespace(sequence_parallel=False)
    logprobs = response_logprobs(
        hidden_states=hidden, output_layer=layer, output_weight=None, config=config, context=context
    )
    assert isinstance(logprobs, torch.Tensor)
    logprobs.sum().backward()
    assert gradient(hidden).is_meta


def test_several_ids_a_row():
    """Given ids and the most probable ones, with the ids told and without."""
    layer: Any = torch.nn.Linear(16, 100, bias=False, device=META, dtype=torch.bfloat16)
    layer.tp_group = world()
    indices = torch.zeros(12, dtype=torch.int64, device=META)
    context = {"scored_rows": indices, "target_ids": indices, "vocab_size": 90, "own_top": 5}
    context["soft_ids"] = torch.zeros(12, 3, dtype=torch.int64, device=META)
    given: Any = {"output_layer": layer, "output_weight": None}
    given["config"] = SimpleNamespace(sequence_parallel=False)
    for told in (False, True):
        hidden = random(40, 1, 16, dtype=torch.bfloat16, grad=True)
        context["top_ids"] = told
        found = response_logprobs(hidden_states=hidden, context=context, **given)
        logprobs = found.logprobs if isinstance(found, TopLogprobs) else found
        assert isinstance(found, TopLogprobs) == told and logprobs.shape == (12, 9)
        logprobs.sum().backward()
        assert gradient(hidden).is_meta


def soft_targets(length: int, values: bool) -> SoftTargets:
    """Targets of one response: four ids a token, one of them a group, and two texts."""
    ids = np.arange(4 * length, dtype=np.int32).reshape(length, 4)
    ids[:, 1] = -2
    chunks = np.array([[0, 2], [2, 3]], np.int32)
    return SoftTargets(
        ids,
        np.full((length, 4), 0.2, np.float32),
        np.full(length, 0.2, np.float32),
        np.ones(length, np.uint8),
        chunks,
        np.full(2, -3, np.float32),
        np.ones(2, np.float32),
        np.zeros((length, 3, 4), np.float32) if values else None,
    )


def row_of(
    responses: int | None, *, shared: bool = False, sources: int = 3, reads: Collection[str] = ()
) -> dict:
    """A collated row of four pairs on the device, indices aside, as training hands it on.

    None: lists of 4, 4, 4 and 2 responses, with rewards.
    """
    lists, responses = responses is None, responses or 4
    soft = {"top_values", "soft_probs"} & {*reads}
    rng = np.random.default_rng(0)
    pairs = [
        PreferencePair(
            i,
            rng.integers(0, 90, 4),
            tuple(
                rng.integers(0, 90, 0 if lists and i == 3 and r >= 2 else 3 + r)
                for r in range(responses)
            ),
            i % 2,
            PairValues(
                np.zeros(responses, np.float32),
                np.zeros((responses, sources), np.float32),
                np.ones((responses, sources), np.int64),
                np.ones(sources, bool),
                np.ones(sources + 1, np.float32),
                np.ones(sources + 1, np.float32),
            ),
            rewards=rng.random(responses, np.float32) if lists else None,
            targets=soft_targets(3, "top_values" in reads) if soft else None,
            groups=[np.array([5, 6, 7])],
        )
        for i in range(4)
    ]
    row = collate(pairs, RowLayout(16, share_prompt=shared))
    on_device = {k: v.to(META) if torch.is_tensor(v) else v for k, v in row.items()}
    waste = {name: torch.empty(2, device=META) for name in ("waste/padding", "waste/imbalance")}
    return on_device | waste | {"indices": row["indices"], "ends_step": False}


@pytest.fixture
def loss_of(monkeypatch):
    """Sum of a method's losses over a row, with all that training computes beside it."""
    monkeypatch.setattr(training_step, "current_step", lambda: 3)
    monkeypatch.setattr(training_step, "pairs_seen", lambda: 24)

    def compute(method: Method) -> None:
        targets = SimpleNamespace(sources=("a", "b")) if method.soft_targets else None
        train = SimpleNamespace(
            source_names=("a", "b", "c"), domains=("code", "math"), targets=targets
        )
        data: Any = SimpleNamespace(train=train, valid=None)
        run: Any = SimpleNamespace(
            config=SimpleNamespace(method=method),
            schedule=SimpleNamespace(total=80),
            conduct=SimpleNamespace(check_for_nan=True),
        )
        step = training_step.TrainingStep(run, data)
        with torch.utils._python_dispatch._disable_current_modes():  # collating is the host's
            row = row_of(method.responses, reads=method.reads)
        more = (row["soft_ids"].shape[1],) if "soft_ids" in row else ()
        columns = (1 + sum(more) + row.get("own_top", 0),) if method.soft_targets else ()
        logprobs = random(row["target_ids"].numel(), *columns, grad=True)
        loss, count, metrics = step.loss(row, logprobs)
        loss.backward()
        assert gradient(logprobs).is_meta and loss.is_meta and loss.dtype == torch.float32
        assert count.is_meta and count.dtype == torch.int32
        assert "loss" in metrics and "waste/padding" in metrics
        for name, values in metrics.items():
            assert values.is_meta and values.dtype == torch.float32 and values.shape == (2,), name

    return compute


@pytest.mark.parametrize("name", METHODS)
def test_methods(loss_of, name):
    """Sums, references, losses, metrics and the search for NaN of every preset."""
    loss_of(resolve(name))


@pytest.mark.parametrize("objective", LOSSES)
def test_losses(loss_of, objective):
    needed = [n for n, o in LOSSES[objective].options.items() if o.required and o.default is None]
    options = dict.fromkeys(needed, 0.1)
    if LOSSES[objective].responses is None:
        for clip in (False, "rewards" in LOSSES[objective].reads):
            loss_of(resolve("infifpo", objective=objective, clip=clip, **options))
        return
    loss_of(resolve("infifpo-wrpo" if objective == "wrpo" else "infifpo", objective=objective,
                    sft_weight=0.5, **options))  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [("fuserlhf", {"reward_normalization": "group", "clip": True}), ("pad", {"divergence": "jsd"})],
)
def test_options_of_lists(loss_of, name, options):
    loss_of(resolve(name, **options))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("anchor", MARGIN_ANCHORS)
@pytest.mark.parametrize("space", MARGIN_SPACES)
def test_margins(loss_of, space, anchor, selection):
    options = {"margin_space": space, "margin_anchor": anchor, "selection": selection}
    loss_of(resolve("fpo", initial_as_source=anchor == "current", **options))


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("clip", [False, True])
def test_fusions(loss_of, fusion, clip):
    loss_of(resolve("infifpo", fusion=fusion, clip=clip))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(torch.bfloat16, 64), (torch.float16, 128), (torch.float32, 64), (torch.bfloat16, 20)],
)
def test_attention(dtype, size, window, shared):
    """The real flash operator, and what takes the place of it: one call a segment, no waits."""
    config = SimpleNamespace(
        attention_dropout=0.0,
        window_size=None if window is None else (window, 0),
        window_attn_skip_freq=None,
        context_parallel_size=1,
    )
    module = PackedAttention(config, 1, None, "self")
    with torch.utils._python_dispatch._disable_current_modes():
        row = row_of(2, shared=shared)
    joint = random(row["tokens"].numel(), 1, 8, size, dtype=dtype, grad=True)
    query, key, value = joint.split([4, 2, 2], dim=2)
    out = module(query, key, value, packed_seq_params=row_params(row))
    assert out.is_meta and out.dtype == dtype and out.shape == (len(joint), 1, 4 * size)
    out.sum().backward()
    assert gradient(joint).is_meta
