"""Costs on paper: parameters of the published models, memory by layout, operations."""

import pytest

from megatron_infifpo.models.families import megatron_args, tensor_parallel_sizes
from megatron_infifpo.models.published import PUBLISHED
from megatron_infifpo.planning import Layout, Plan, layouts

SIZES = {"phi-4": 14_659_507_200, "mistral-small-24b": 23_572_403_200}


@pytest.mark.parametrize("name", SIZES)
def test_parameters(name):
    """Norms and biases, which are left out, are less than a thousandth."""
    assert Plan(megatron_args(PUBLISHED[name])).parameters == pytest.approx(SIZES[name], rel=1e-3)


def test_every_rank_holds_its_share():
    """What all ranks hold together is the model, whatever the layout."""
    model = megatron_args(PUBLISHED["phi-4"])
    plan = Plan(model)
    for layout in layouts(16, tensor_parallel_sizes(model), 40, 8, 128):
        assert layout.tensor * layout.pipeline * layout.data == 16
        stages = [plan._stage(layout, s, 1000, 8, 0.0, False) for s in range(layout.pipeline)]
        weights = layout.tensor * sum(stage.weights for stage in stages)
        assert weights == pytest.approx(2 * plan.parameters)
        optimizer = layout.tensor * layout.data * sum(stage.optimizer for stage in stages)
        assert optimizer == pytest.approx(12 * plan.parameters)


def test_what_shrinks_memory():
    plan = Plan(megatron_args(PUBLISHED["phi-4"]))

    def total(*layout, **options):
        return plan.memory(Layout(*layout), 8192, 16, **options).total

    whole = total(1, 1, 16)
    assert total(2, 1, 8) < whole and total(1, 2, 8) < whole
    assert total(1, 1, 16, recompute=True) < whole
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


def test_operations():
    """Six a parameter and token, attention's own, and the head's eight for scored tokens only."""
    plan = Plan(megatron_args(PUBLISHED["phi-4"]))
    layers = plan.layers * plan.layer_parameters
    assert plan.operations(1000, 0, 0) == 6 * layers * 1000
    head = plan.operations(1000, 100, 0) - plan.operations(1000, 0, 0)
    assert head == 8 * plan.table_parameters * 100
    attention = plan.operations(1000, 0, 4000) / plan.operations(1000, 0, 0) - 1
    assert attention == pytest.approx(0.060, abs=0.001)


def test_the_command(ranks):
    ranks(1, "workers:run_tool", "plan_run", ["--model", "phi-4", "--gpus", "16"])
    lines = ranks.logs[0].splitlines()
    assert "14.66 billion parameters" in ranks.logs[0]
    assert sum("does not fit" in line for line in lines) == 6
    fits = [line for line in lines if line.strip()[:1].isdigit() and "does not fit" not in line]
    hours = [float(line.split()[-1]) for line in fits]
    assert hours == sorted(hours) and len(fits) == 10
