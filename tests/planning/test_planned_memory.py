"""What layers keep for the backward pass and what a save needs, on paper and in real runs."""

from dataclasses import replace

import pytest

from megatron_infifpo.engine.kept import ON_CPU
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.plan import Plan
from megatron_infifpo.planning.recompute import BOTH as ATTENTION_AND_MLP
from megatron_infifpo.planning.recompute import FLAGS, MLP, SELECTIVE
from megatron_infifpo.planning.saves import BY_NAME, BY_RANK, SAVED, SPARING
from support.runs import BOTH, LAYOUTS

RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
RECOMPUTE += ["--recompute-num-layers", "1"]


@pytest.mark.parametrize("share", ["--share-prompt", "--no-share-prompt"])
@pytest.mark.parametrize("layout", ["tp1", "tp2-sp", "pp2"])
def test_kept(setup, ranks, layout, share):
    """Within 15 %, on every rank."""
    world, flags = LAYOUTS[layout]
    argv = setup.flags(setup.sources("both", *BOTH), *flags, share)
    results = ranks(world, "support.training:kept_bytes", argv)
    plan = Plan(megatron_args(read_hf_config(setup.hf)), "fp32", ON_CPU)
    stages = 2 if layout == "pp2" else 1
    for rank, found in enumerate(results):
        gathered = found["keys"] / found["tokens"] if share == "--share-prompt" else 0.0
        token = plan.sizes.layers / stages * plan.activations.of_layer(gathered)
        token += plan.activations.of_end() * (rank >= stages - 1)
        planned = found["tokens"] * token / (2 if layout == "tp2-sp" else 1)
        assert found["kept"] == pytest.approx(planned, rel=0.15), (rank, found)


SHARED_ROW = ["--context-parallel-size", "2"]


@pytest.mark.parametrize(
    ("size", "recompute", "share"),
    [
        *((size, SELECTIVE, share) for size in (1, 2) for share in (True, False)),
        (1, MLP, True),
        (2, ATTENTION_AND_MLP, True),
    ],
)
def test_recomputed_parts(setup, ranks, size, recompute, share):
    """Without what is computed again, by the flags of the plan; attention by default at CP 2."""
    flags = [] if (size, recompute) == (2, SELECTIVE) else FLAGS[recompute].split()
    flags += SHARED_ROW if size == 2 else []
    flags += ["--share-prompt" if share else "--no-share-prompt"]
    argv = setup.flags(setup.sources("both", *BOTH), *flags)
    results = ranks(size, "support.training:kept_bytes", argv)
    # The outputs of segments are among what attention computes again.
    kept = replace(ON_CPU, query=ON_CPU.query - (recompute != MLP))
    plan = Plan(megatron_args(read_hf_config(setup.hf)), "fp32", kept)
    copies = size == 2 or share
    for rank, found in enumerate(results):
        assert (found["keys"] > found["tokens"]) == copies
        row = size * found["tokens"]
        memory = plan.memory(
            Layout(1, 1, 1, size), row, 1,
            gathered=found["keys"] / row if copies else 0.0, recompute=recompute,
        )  # fmt: skip
        planned = memory.activations + found["tokens"] * plan.activations.of_end()
        # Attention's kernels keep a little beside, which nothing takes away from an MLP's run.
        close = 0.08 if recompute == MLP else 0.04
        assert found["kept"] == pytest.approx(planned, rel=close), (rank, found)


@pytest.mark.parametrize("flags", [[], SHARED_ROW])
def test_recomputed(setup, ranks, flags):
    """Only the input of each layer is kept."""
    argv = setup.flags(setup.sources("both", *BOTH), *RECOMPUTE, *flags)
    plan = Plan(megatron_args(read_hf_config(setup.hf)), "fp32", ON_CPU)
    for found in ranks(2 if flags else 1, "support.training:kept_bytes", argv):
        planned = found["tokens"] * (
            plan.sizes.layers * plan.sizes.hidden * 4 + plan.activations.of_end()
        )
        assert found["kept"] == pytest.approx(planned, rel=0.15)


SAVINGS = {
    "by-rank": (BY_RANK, []),
    "by-name": (BY_NAME, ["--dist-ckpt-optim-fully-reshardable"]),
    "sparing": (
        SPARING,
        ["--dist-ckpt-optim-fully-reshardable", "--distrib-optim-fully-reshardable-mem-efficient"],
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SAVINGS)
def test_saved(setup, ranks, tmp_path, name, precision):
    """What two data-parallel ranks gather, and what each then writes."""
    saving, flags = SAVINGS[name]
    more = ["--bf16"] if precision == "bf16" else []
    argv = setup.flags(setup.sources("both", *BOTH), "--save", str(tmp_path / "run"), *flags, *more)
    results = ranks(2, "support.saves:save_bytes", argv)
    weight = 2 if precision == "bf16" else 4
    written = 0.0
    for rank, found in enumerate(results):
        parameters = found["parameters"]
        planned = saving.gathered_bytes(parameters, 2, first=rank == 0)
        # Gloo may hold on to one value a moment longer.
        assert 0.98 * planned <= found["gathered"] <= 1.02 * planned + 4 * parameters, (rank, found)
        planned = saving.written_bytes(parameters, 2, weight, first=rank == 0)
        # Whole parameters are dealt to ranks, and few are here.
        assert found["written"] == pytest.approx(planned, rel=0.3), (rank, found)
        written += found["written"]
    assert written == pytest.approx((SAVED + weight) * parameters, rel=0.02)
