"""Plans of mixtures of experts: their parameters, how ranks share them, what they exchange."""

import json
from typing import Any

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.planning.activations import IMBALANCE
from megatron_infifpo.planning.estimate import estimate
from megatron_infifpo.planning.fit import MEASURES, fit
from megatron_infifpo.planning.flags import training_flags
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout, layouts
from megatron_infifpo.planning.models import planned_model
from megatron_infifpo.planning.plan import Plan
from megatron_infifpo.planning.recompute import FULL, NONE

QWEN = planned_model("qwen3-30b-a3b")
EXPERTS = 48 * 128 * 3 * 2048 * 768  # parameters of Qwen3-30B-A3B's
MIXTRAL = {
    "model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip


def test_parameters():
    """As published: 30.5 billion, 3.3 used; and Mixtral's 46.7 and 12.9."""
    sizes = Plan(QWEN).sizes
    assert sizes.parameters == pytest.approx(30_532_122_624, rel=1e-4)
    assert sizes.multiplied + 2 * sizes.table == pytest.approx(3.35e9, rel=1e-2)
    sizes = Plan(megatron_args(MIXTRAL)).sizes
    assert sizes.parameters == pytest.approx(46_702_792_704, rel=1e-4)
    assert sizes.multiplied + 2 * sizes.table == pytest.approx(12.9e9, rel=1e-2)


def test_layers_without_experts():
    """Every other layer has some, but not those that are named."""
    config = {
        "model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "head_dim": 8, "hidden_act": "silu", "hidden_size": 16, "intermediate_size": 40,
        "max_position_embeddings": 64, "moe_intermediate_size": 24, "num_attention_heads": 2,
        "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 6,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "vocab_size": 32,
        "tie_word_embeddings": False, "norm_topk_prob": True,
    }  # fmt: skip
    sizes = Plan(megatron_args(config)).sizes
    assert sizes.sparse == (False, True, False, False, False, True)
    attention, dense, expert = 16 * (2 * 16 + 2 * 8), 3 * 16 * 40, 3 * 16 * 24
    layers = 6 * attention + 4 * dense + 2 * (16 * 4 + 4 * expert)
    assert sizes.parameters == layers + 2 * 32 * 16
    assert sizes.multiplied == 6 * attention + 4 * dense + 2 * (16 * 4 + 2 * expert)
    first, second = (sizes.stage(Layout(1, 2, 1), stage) for stage in (0, 1))
    assert first.experts == second.experts == 4 * expert
    assert first.split == second.split  # one of three layers has experts, and a table each


def test_memory():
    """Experts take 6 + 12 / EDP bytes a parameter, of which a rank has 1 / EP."""
    plan = Plan(QWEN)
    for layout in (Layout(1, 1, 8, expert=8), Layout(2, 1, 8, expert=4), Layout(1, 1, 4, 2, 2)):
        memory, ranks = plan.memory(layout, 8192, 4), layout.expert_shards
        assert ranks * layout.expert == layout.tensor * layout.data * layout.context
        state = memory.weights + memory.gradients + memory.optimizer
        rest = plan.sizes.parameters - EXPERTS
        each = rest / layout.tensor
        shared = 48 * 2048 * 128 * (1 - 1 / layout.tensor)  # routers are on every rank
        expected = (6 + 12 / ranks) * EXPERTS / layout.expert
        expected += (6 + 12 / layout.shards) * (each + shared)
        assert state == pytest.approx(expected)


def test_every_rank_holds_its_share():
    plan = Plan(QWEN)
    found = layouts(16, [1, 2, 4], 48, 8, 128, contexts=True, experts=128)
    assert {layout.expert for layout in found} == {1, 2, 4, 8}
    for layout in found:
        stages = plan.stages(layout, 1000, 8)
        ranks = layout.tensor * layout.shards
        assert ranks % layout.expert == 0
        every = sum(stage.optimizer for stage in stages) * ranks
        routers = 12 * 48 * 2048 * 128 * (layout.tensor - 1)
        assert every == pytest.approx(12 * plan.sizes.parameters + routers)


def test_activations():
    """Of a token, for each of eight experts: its row there and back, and three inner ones."""
    plan = Plan(QWEN)
    dense = plan.activations.of_layer()
    sparse, spread = (
        plan.activations.of_layer(sparse=True, spread=spread) for spread in (False, True)
    )
    rows = 8 * (2 * 2048 + 3 * 768) * 2
    inside = 3 * 6144 * 2
    assert sparse == pytest.approx(dense - inside + rows + 8 * 128)
    assert spread - sparse == pytest.approx((IMBALANCE - 1) * rows)


def test_exchange():
    """A rank's tokens go to eight experts and back, twice; three times where computed again."""
    plan, layout = Plan(QWEN), Layout(1, 1, 8, expert=8)
    once = 48 * 1000 * 8 * 2048 * 2 * 7 / 8
    assert plan.communication(layout, 1000, NONE).expert == pytest.approx(4 * once)
    assert plan.communication(layout, 1000, FULL).expert == pytest.approx(6 * once)
    assert plan.communication(Layout(1, 1, 8), 1000, NONE).total == 0
    split = Layout(2, 1, 4, expert=8)
    assert plan.communication(split, 1000, NONE).expert == pytest.approx(4 * once / 2)
    # With its experts whole on a rank a layer gathers and scatters rows for attention alone.
    rows = 5 * 48 * 1000 / 2 * 2048 * 2
    assert plan.communication(split, 1000, NONE).tensor == pytest.approx(rows)


def test_operations():
    plan = Plan(QWEN)
    used = 48 * (2048 * (2 * 4096 + 2 * 512) + 2048 * 128 + 8 * 3 * 2048 * 768)
    assert plan.operations(1000, 0, 0) == pytest.approx(6 * used * 1000)


def fitted(gpus: int, **options: Any) -> Any:
    return fit(PlanningJob(QWEN, gpus), **options)


def test_qwen_on_a_node_and_on_two():
    """All of it fits eight GPUs of 80 GiB, and sixteen with less computed again."""
    one, two = fitted(8), fitted(16)
    assert one.memory.total < 74 * 2**30 and two.memory.total < 74 * 2**30
    assert one.recompute == FULL and two.recompute == NONE
    spread = fitted(8, measures=MEASURES)
    assert spread.layout.expert == 8 and spread.hours < one.hours
    assert "--expert-model-parallel-size 8" in " ".join(spread.flags)


def test_flags():
    """Experts are whole where tensor parallelism splits the rest."""
    job = PlanningJob(QWEN, 8)
    found = {one.layout: training_flags(job, one) for one in estimate(job)}
    assert (
        "--expert-model-parallel-size 4 --sequence-parallel --expert-tensor-parallel-size 1"
        in (found[Layout(2, 1, 4, expert=4)])
    )
    assert "--expert-tensor" not in found[Layout(1, 1, 8, expert=8)]


def test_a_folder_of_experts(tmp_path):
    """config.json says it all; what no family has and is no such mixture is refused."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    assert Plan(planned_model(str(tmp_path))).sizes.parameters > 46e9
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL | {"model_type": "dbrx"}))
    with pytest.raises(UserError, match="model_type is 'dbrx', expected one of"):
        planned_model(str(tmp_path))
