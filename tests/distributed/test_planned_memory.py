"""What layers keep for the backward pass, counted on paper and in real steps."""

import pytest
from test_training import BOTH, LAYOUTS

from megatron_infifpo.models.architecture import read_hf_config
from megatron_infifpo.models.families import megatron_args
from megatron_infifpo.planning import CPU_KEPT, Plan

RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
RECOMPUTE += ["--recompute-num-layers", "1"]


@pytest.mark.parametrize("share", ["--share-prompt", "--no-share-prompt"])
@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "pp2"])
def test_kept(setup, ranks, layout, share):
    """Within 15 %, on every rank."""
    world, flags = LAYOUTS[layout]
    argv = setup.flags(setup.sources("both", *BOTH), *flags, share)
    results = ranks(world, "workers:kept_bytes", argv)
    plan = Plan(megatron_args(read_hf_config(setup.hf)), "fp32", CPU_KEPT)
    stages = 2 if layout == "pp2" else 1
    for rank, found in enumerate(results):
        gathered = found["keys"] / found["tokens"] if share == "--share-prompt" else 0.0
        token = plan.layers / stages * plan.activation_bytes(gathered)
        token += plan.end_bytes() * (rank >= stages - 1)
        planned = found["tokens"] * token / (2 if layout == "tp2-sp" else 1)
        assert found["kept"] == pytest.approx(planned, rel=0.15), (rank, found)


def test_recomputed(setup, ranks):
    """Only the input of each layer is kept."""
    argv = setup.flags(setup.sources("both", *BOTH), *RECOMPUTE)
    found = ranks(1, "workers:kept_bytes", argv)[0]
    plan = Plan(megatron_args(read_hf_config(setup.hf)), "fp32", CPU_KEPT)
    planned = found["tokens"] * (plan.layers * plan.hidden * 4 + plan.end_bytes())
    assert found["kept"] == pytest.approx(planned, rel=0.15)
