"""Costs on paper: parameters of the published models, memory by layout, operations."""

import functools
import math
from typing import Any

import pytest
import torch

from megatron_infifpo.commands.main import make_parser
from megatron_infifpo.engine.kept import LAYERS
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import PUBLISHED, megatron_args, tensor_parallel_sizes
from megatron_infifpo.flag_types import flag as spelled
from megatron_infifpo.planning.estimate import estimate
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout, layouts
from megatron_infifpo.planning.plan import FLASH, Plan
from megatron_infifpo.planning.recompute import FULL, NONE, SELECTIVE
from megatron_infifpo.planning.saves import BY_NAME, BY_RANK, SPARING
from support.saves import LiveBytes

SIZES = {"phi-4": 14_659_507_200, "mistral-small-24b": 23_572_403_200}


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name):
    """Norms and biases, which are left out, are less than a thousandth."""
    assert Plan(megatron_args(PUBLISHED[name])).sizes.parameters == pytest.approx(
        SIZES[name], rel=1e-3
    )


def test_every_rank_holds_its_share():
    """What all ranks hold together is the model, whatever the layout."""
    model = megatron_args(PUBLISHED["phi-4"])
    plan = Plan(model)
    found = layouts(16, tensor_parallel_sizes(model), 40, 8, 128, contexts=True)
    assert {layout.context for layout in found} == {1, 2, 4, 8}
    for layout in found:
        assert layout.tensor * layout.pipeline * layout.data * layout.context == 16
        stages = plan.stages(layout, 1000, 8)
        weights = layout.tensor * sum(stage.weights for stage in stages)
        assert weights == pytest.approx(2 * plan.sizes.parameters)
        optimizer = layout.tensor * layout.shards * sum(stage.optimizer for stage in stages)
        assert optimizer == pytest.approx(12 * plan.sizes.parameters)


def test_what_shrinks_memory():
    plan = Plan(megatron_args(PUBLISHED["phi-4"]))

    def total(*layout, **options):
        return plan.memory(Layout(*layout), 8192, 16, **options).total

    whole = total(1, 1, 16)
    assert total(2, 1, 8) < whole and total(1, 2, 8) < whole
    assert total(1, 1, 16, recompute=FULL) < total(1, 1, 16, recompute=SELECTIVE) == whole
    assert total(1, 1, 16, gathered=1.25) < whole, "selected keys let go of the joint projection"
    assert total(1, 1, 8, 2) < whole, "ranks that share a row share the optimizer's state too"
    first = plan.memory(Layout(2, 4, 2), 8192, 16)
    assert first.activations == plan.memory(Layout(2, 1, 8), 8192, 16).activations, (
        "the first stage keeps as many rows in flight as there are stages"
    )


def test_legal_layouts():
    """Phi-4 splits by 5 and 10, but a node of 8 GPUs does not; and a batch of 128 not by 5."""
    sizes = tensor_parallel_sizes(megatron_args(PUBLISHED["phi-4"]))
    found = layouts(40, sizes, 40, 8, 128)
    assert found and all(x.tensor in (1, 2) and 128 % x.data == 0 for x in found)
    assert {x.tensor for x in layouts(5, sizes, 40, 8, 128)} == {1, 5}
    assert all(x.context == 1 for x in found)
    for x in layouts(40, sizes, 40, 8, 128, contexts=True):
        assert 8 % (x.tensor * x.context) == 0, "ranks of a row are in one node"
    assert {x.context for x in layouts(6, [1], 40, 8, 6, contexts=True)} == {1, 2, 3, 6}


def test_saves():
    """Phi-4, 14.66 billion parameters, on two nodes of eight GPUs; in billions of bytes."""
    plan = Plan(megatron_args(PUBLISHED["phi-4"]))
    quarter, half = Layout(2, 2, 4), Layout(2, 1, 8)

    def host(layout, saving):
        return plan.host_memory(layout, saving, 8) / 1e9

    def gpu(layout, saving):
        return plan.memory(layout, 8192, 16, saving=saving).save / 1e9

    for layout in (quarter, half):
        # Every parameter, its float32 copy and two moments are written once.
        assert host(layout, BY_RANK) == pytest.approx(14 * 14.66 / 2, rel=1e-3)
        assert gpu(layout, BY_RANK) == gpu(layout, SPARING) == 0
    # All that is gathered, on each of eight ranks; while it is, 12 bytes a parameter more, and the
    # rank's own share.
    assert host(quarter, BY_NAME) == pytest.approx(8 * (24 + 12 / 4) * 14.66 / 4, rel=1e-3)
    assert host(half, BY_NAME) == pytest.approx(8 * (24 + 12 / 8) * 14.66 / 2, rel=1e-3)
    assert gpu(quarter, BY_NAME) == pytest.approx(18.3, abs=0.1)
    assert gpu(half, BY_NAME) == pytest.approx(33.0, abs=0.1)
    # Two ranks of eight gather; the others send.
    sparing = 2 * (24 + 12 / 4) + 6 * 12 / 4
    assert host(quarter, SPARING) == pytest.approx(sparing * 14.66 / 4, rel=1e-3)


def test_moments_of_a_run():
    """The update and a save come after the activations are gone."""
    plan = Plan(megatron_args(PUBLISHED["phi-4"]))
    layout = Layout(2, 2, 4)
    fused, plain = (plan.memory(layout, 64, 1, fused_adam=fused) for fused in (True, False))
    assert fused.update == 0 and plain.update == pytest.approx(plain.optimizer / 3)
    state = plain.weights + plain.gradients + plain.optimizer
    assert plain.total == state + plain.update, "a short row's activations are less"
    long = plan.memory(layout, 8192, 16, fused_adam=False)
    assert long.total == state + long.activations + max(long.head, long.attention)
    saved = plan.memory(layout, 8192, 16, saving=BY_NAME, recompute=FULL)
    assert saved.total == state + saved.save


def test_the_update_of_pytorch():
    """What AdamW's kernels over lists, which it takes on a GPU, hold at once."""
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    adam = torch.optim.AdamW([weight], foreach=True)
    adam.step()
    with LiveBytes() as live:
        adam.step()
    assert live.peak == pytest.approx(4 * 1000, rel=0.1)


def test_fp8():
    """Two bytes a parameter of linear layers more, and none of the tables."""
    model = megatron_args(PUBLISHED["phi-4"])
    plans = [Plan(model, precision, LAYERS["te"].kept) for precision in ("bf16", "fp8")]
    weights = [plan.memory(Layout(1, 1, 1), 8192, 1).weights for plan in plans]
    assert weights[1] - weights[0] == 2 * plans[0].sizes.multiplied


def test_operations():
    """Six a parameter and token, attention's own, and the head's eight for scored tokens only."""
    plan = Plan(megatron_args(PUBLISHED["phi-4"]))
    layers = plan.sizes.multiplied
    assert plan.operations(1000, 0, 0) == 6 * layers * 1000
    head = plan.operations(1000, 100, 0) - plan.operations(1000, 0, 0)
    assert head == 8 * plan.sizes.table * 100
    attention = plan.operations(1000, 0, 4000) / plan.operations(1000, 0, 0) - 1
    assert attention == pytest.approx(0.060, abs=0.001)
    flash = plan.operations(1000, 0, 4000, attention=FLASH) / plan.operations(1000, 0, 0) - 1
    assert flash == pytest.approx(attention * 7 / 6)


def test_the_command(ranks):
    argv = ["--model", "phi-4", "--gpus", "16"]
    ranks(1, "support.tools:run_tool", "plan_run", argv)
    best = ranks.logs[0]
    assert "14.66 billion parameters" in best
    table = [line.split() for line in best.splitlines() if line.strip()[:1].isdigit()]
    assert [" ".join(row[:5]) for row in table] == ["2 2 1 4 none", "2 4 1 2 none", "2 8 1 1 none"]
    ranks(1, "support.tools:run_tool", "plan_run", [*argv, "--all"])
    first, all_of_them = ranks.logs[0].split("\n\n")
    assert first in best.strip()
    lines = [line for line in all_of_them.splitlines() if line.strip()[:1].isdigit()]
    assert len(lines) == 24 and sum("does not fit" in line for line in lines) == 7
    hours = [float(line.split()[-1]) for line in lines if "does not fit" not in line]
    assert hours == sorted(hours) and len(hours) == 17


@pytest.mark.parametrize(
    "flag", ["--mfu", "--gpu-memory", "--gpu-tflops", "--gpus", "--micro-batch-tokens", "--pairs"]
)
def test_numbers_that_are_none(flag, capsys):
    parser = make_parser("plan")[1]
    for value in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(["--model", "m", "--gpus", "8", flag, value])
        assert stopped.value.code == 2
        assert f"argument {flag}: {value!r}, expected a" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpu_memory", "gpu_tflops", "gpu_bandwidth", "mfu"])
def test_jobs_that_cannot_be(name):
    job: Any = functools.partial(PlanningJob, {}, 8)
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(
            UserError, match=f"{spelled(name)} is {value}, expected a number above 0"
        ):
            job(**{name: value})


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("responses", [2, 8, 32])
def test_lists(share, responses):
    """Hours by hand: so many prompts and responses a list; and a row has a whole list at least."""
    job = PlanningJob(
        megatron_args(PUBLISHED["phi-4"]),
        8,
        pairs=1000,
        sft_records=0,
        responses=responses,
        share_prompt=share,
        prompt_tokens=400,
        response_tokens=600,
    )
    tokens = (1 if share else responses) * 400 + responses * 600
    # A response sees its prompt and itself; the prompt sees itself, once or for each of them.
    seen = (1 if share else responses) * 400**2 + responses * 600 * (2 * 400 + 600)
    scored = 1000 * responses * 600
    work = job.plan.operations(1000 * tokens, scored, seen / tokens, attention=FLASH)
    found = [one for one in estimate(job) if (one.layout, one.recompute) == (Layout(2, 1, 4), NONE)]
    assert found[0].spent.computing == pytest.approx(work / (8 * 989e12 * 0.35) / 3600)
    gathered = responses * 1000 / tokens if share else 0.0
    row = max(8192, tokens)
    expected = job.plan.memory(Layout(2, 1, 4), row, 1, gathered=gathered)
    assert found[0].memory.activations == expected.activations
