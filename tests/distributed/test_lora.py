"""Adapters train at every layout as on one rank; checkpoints hold them alone."""

import pytest

from support.runs import BOTH, LAYOUTS, steps_of

TRAIN = "support.training:train"
LORA = ["--lora-rank", "4", "--lora-alpha", "12"]


@pytest.fixture
def flags(setup):
    def make(*more: str) -> list[str]:
        return setup.flags(setup.sources("both", *BOTH), *LORA, *more)

    return make


@pytest.fixture(scope="module")
def straight(setup, ranks) -> dict:
    """Three steps on one rank."""
    argv = setup.flags(setup.sources("both", *BOTH), *LORA)
    (record,) = ranks(1, TRAIN, argv)
    return record


@pytest.mark.parametrize("layout", ["tp2", "tp2-sp", "pp2", "pp2-vpp2", "cp2", "dp2"])
def test_layouts(ranks, flags, straight, layout):
    world, more = LAYOUTS[layout]
    found = ranks(world, TRAIN, flags(*more))
    assert "the pivot agrees" in ranks.logs[0]
    losses = [step["loss"] for step in steps_of(found)]
    assert losses == pytest.approx([step["loss"] for step in straight["steps"]], abs=1e-5)
    assert found[0]["norms"] == pytest.approx(straight["norms"], rel=1e-4)
