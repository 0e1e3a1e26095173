"""A row cut over ranks, which gather keys and values: the same losses, gradients, parameters."""

import pytest

from support.runs import steps_of

CP = "--context-parallel-size"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
# name -> ranks, flags
LAYOUTS = {
    "cp2": (2, [CP, "2"]),
    "cp4": (4, [CP, "4"]),
    "cp2-tp2-sp": (4, [CP, "2", TP, "2", "--sequence-parallel"]),
    "cp2-pp2-vpp2": (4, [CP, "2", PP, "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "cp2-dp2": (4, [CP, "2", "--overlap-grad-reduce", "--overlap-param-gather"]),
}


def run(setup, ranks, method: str, world: int, *flags: str) -> dict:
    """Three steps: metrics of each, and the gradient norms."""
    results = ranks(world, "support.training:train", setup.method_flags(method, *flags))
    return {"steps": steps_of(results), "norms": results[0]["norms"]}


def assert_same(found: dict, wanted: dict) -> None:
    for step, reference in zip(found["steps"], wanted["steps"], strict=True):
        assert step.keys() == reference.keys()
        for name, value in reference.items():
            # Ties at the start; waste is the layout's.
            if not name.endswith("rewards/accuracy") and not name.startswith("waste/"):
                assert step[name] == pytest.approx(value, abs=1e-4, rel=1e-5, nan_ok=True), name
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)


@pytest.fixture(scope="module")
def expected(setup, ranks):
    """The same on one rank; made once a method."""
    made: dict[str, dict] = {}

    def get(method: str) -> dict:
        if method not in made:
            made[method] = run(setup, ranks, method, 1)
        return made[method]

    return get


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(setup, ranks, expected, layout):
    world, flags = LAYOUTS[layout]
    assert_same(run(setup, ranks, "infifpo", world, *flags), expected("infifpo"))
