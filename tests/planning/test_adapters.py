"""Plans of low-rank adapters: how many, what ranks hold of them, what a step costs."""

from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import PUBLISHED, megatron_args
from megatron_infifpo.planning.adapters import Adapters
from megatron_infifpo.planning.estimate import estimate
from megatron_infifpo.planning.fit import fit
from megatron_infifpo.planning.flags import training_flags
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.models import planned_model
from megatron_infifpo.planning.plan import Plan
from megatron_infifpo.planning.recompute import FULL, NONE
from megatron_infifpo.planning.saves import BY_RANK

LLAMA = planned_model("llama-3.3-70b")
PHI = megatron_args(PUBLISHED["phi-4"])


def job(model: Any = LLAMA, **options: Any) -> PlanningJob:
    return PlanningJob(model, 8, **({"lora_rank": 16} | options))


def test_parameters():
    """Rank 16 on all linear layers of a Llama of 70 billion: by hand, a layer's seven."""
    hidden, key, ffn = 8192, 1024, 28_672
    widths = (hidden, key, key, hidden, ffn, ffn, ffn)
    expected = 80 * 16 * sum(hidden + width for width in widths)
    assert job().plan.trained == expected == 207_093_760
    some = job(lora_targets=["q_proj", "v_proj"]).plan.trained
    assert some == 80 * 16 * (2 * hidden + hidden + key)
    assert job(lora_targets=["all-linear"]).plan.trained == expected
    # Phi-4's files have one tensor for three projections, and one for two.
    fused = job(PHI).plan.trained
    assert fused == 40 * 16 * (5120 + 7680 + 2 * 5120 + 5120 + 2 * 17_920 + 17_920 + 5120)


def test_experts_are_frozen():
    """Of Qwen3-30B-A3B the attention is adapted; experts are held whole, over their ranks."""
    model = planned_model("qwen3-30b-a3b")
    plan, whole, layout = job(model).plan, Plan(model), Layout(1, 1, 8, expert=8)
    hidden, query, key = 2048, 4096, 512
    expected = 48 * 16 * ((hidden + query) + 2 * (hidden + key) + (query + hidden))
    assert plan.trained == expected == 13_369_344
    found = plan.memory(layout, 8192, 16)
    assert found.weights == pytest.approx(whole.memory(layout, 8192, 16).weights + 2 * expected)
    assert found.gradients == 4 * expected and found.optimizer == pytest.approx(12 * expected / 8)
    fitting = fit(job(model, lora_rank=16))
    assert fitting.measures == () and fitting.recompute == NONE


def test_on_ranks():
    """One of A and B is split, the other whole: together they are the adapter and more of these."""
    adapters = Adapters.of(LLAMA, 16, ["q_proj", "down_proj"])
    assert adapters.on_rank(1) == adapters.parameters
    q, down = 8192 + 8192, 28_672 + 8192
    assert adapters.parameters == 16 * (q + down)
    assert adapters.on_rank(8) == 16 * (8192 + 8192 / 8 + 28_672 / 8 + 8192)
    assert adapters.rows(1) == 32 and adapters.rows(8) == 16 * 9


def test_memory():
    """Frozen weights are two bytes a parameter; the rest is the adapters'."""
    plan, layout = job().plan, Layout(4, 1, 2)
    assert plan.adapters is not None
    found, whole = plan.memory(layout, 8192, 16), Plan(LLAMA).memory(layout, 8192, 16)
    mine = 80 * plan.adapters.on_rank(4)
    assert found.weights == pytest.approx(whole.weights + 2 * mine)
    assert found.gradients == pytest.approx(4 * mine)
    assert found.optimizer == pytest.approx(12 * mine / 2)
    inner = 80 * (8192 / 4) * plan.adapters.rows(4) * 2
    assert found.activations == pytest.approx(whole.activations + inner)
    exact = Plan(LLAMA, "fp32", adapters=plan.adapters).memory(layout, 8192, 16)
    assert exact.weights == pytest.approx(2 * found.weights)


def test_saves_have_adapters_alone():
    plan = job().plan
    assert plan.host_memory(Layout(1, 8, 1), BY_RANK, 8) == pytest.approx(14 * plan.trained)


def test_operations():
    """A frozen weight has no gradient: four a parameter and token in place of six."""
    plan, whole = job().plan, Plan(LLAMA)
    layers = whole.sizes.multiplied
    assert whole.operations(1000, 0, 0) == 6 * layers * 1000
    assert plan.operations(1000, 0, 0) == (4 * layers + 6 * plan.trained) * 1000
    again = plan.operations(1000, 0, 0, recompute=FULL)
    assert again == (6 * layers + 8 * plan.trained) * 1000
    head = plan.operations(1000, 100, 0) - plan.operations(1000, 0, 0)
    assert head == 6 * 8192 * 128_256 * 100


def test_fits_where_the_model_does_not():
    """Seventy billion on eight GPUs of 80 GiB; and nothing else is changed for it."""
    found = fit(job())
    assert found.measures == () and found.recompute == NONE
    assert not any(one.fits for one in estimate(job(lora_rank=None)))
    assert "--lora-rank 16" in " ".join(found.flags)


def test_flags():
    asked = job(lora_targets=["q_proj", "v_proj"])
    flags = training_flags(asked, estimate(asked)[0])
    assert "--lora-rank 16 --lora-targets q_proj v_proj " in flags


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("phi-4", {"lora_targets": ["q_proj"]}, "q_proj: a phi3 model has qkv_proj, o_proj, gate"),
        ("phi-4", {"lora_rank": None, "lora_targets": ["o_proj"]}, "has no effect without --lora"),
        ("phi-4", {"lora_rank": 0}, "--lora-rank is 0, expected a whole number"),
        (
            "qwen3-30b-a3b",
            {"lora_targets": ["gate_proj"]},
            "gate_proj: a qwen3_moe model has q_pro",
        ),
    ],
)
def test_jobs_that_cannot_be(model, options, said):
    with pytest.raises(UserError, match=said):
        estimate(job(planned_model(model), **options))
