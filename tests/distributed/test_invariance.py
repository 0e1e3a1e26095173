"""Random configurations, others each day: loss and gradient norm depend on none of them."""

import random

import pytest

from megatron_infifpo.methods import METHODS
from support.runs import steps_of
from support.seeds import seed

# metric -> absolute tolerance in float32; WRPO's alpha moves with the step, not with the layout
TOLERANCES = {"loss": 1e-4, "logps/margin": 1e-3, "clip-rate": 1e-6, "residual/std": 1e-3}


def configuration(number: int) -> tuple[str, int, list[str], bool]:
    """Draw a method, a number of ranks, flags of a layout, and whether it is in bfloat16."""
    dice = random.Random(f"{seed()} {number}")
    tensor, pipeline, data = dice.choice([1, 2]), dice.choice([1, 2]), dice.choice([1, 2])
    context = dice.choice([1, 2])
    if tensor * pipeline * data == 8:
        data = 1
    if tensor * pipeline * data * context == 8:
        context = 1
    method, half = dice.choice([*METHODS]), dice.random() < 0.25
    flags = ["--tensor-model-parallel-size", str(tensor)]
    flags += ["--pipeline-model-parallel-size", str(pipeline)]
    flags += ["--context-parallel-size", str(context)]
    flags += ["--micro-batch-size", dice.choice(["1", "2", "4"])]
    if tensor == 2 and dice.random() < 0.5:
        flags += ["--sequence-parallel"]
    if pipeline == 2 and dice.random() < 0.5:
        # Interleaved stages take micro-batches by the pipeline's size.
        flags += ["--num-virtual-stages-per-pipeline-rank", "2", "--micro-batch-size", "2"]
    if dice.random() < 0.3:
        flags += ["--recompute-granularity", "full", "--recompute-method", "uniform"]
        flags += ["--recompute-num-layers", "1"]
    if data == 2 and dice.random() < 0.5:
        flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
    if METHODS[method].responses != 1:
        flags += [dice.choice(["--share-prompt", "--no-share-prompt"])]
    if half:
        flags += ["--bf16"]
    return method, tensor * pipeline * data * context, flags, half


@pytest.fixture(scope="module")
def expected(setup, ranks):
    """Steps and norms on one rank, in float32, with two prompts a pair; made once a method."""
    made: dict[str, dict] = {}

    def get(method: str) -> dict:
        if method not in made:
            flags = [] if METHODS[method].responses == 1 else ["--no-share-prompt"]
            made[method] = run(setup, ranks, method, 1, flags)
        return made[method]

    return get


def run(setup, ranks, method: str, world: int, flags: list[str]) -> dict:
    """Three steps: the metrics of each, and the gradient norms."""
    argv = setup.method_flags(method, *flags)
    results = ranks(world, "support.training:train", argv)
    return {"steps": steps_of(results), "norms": results[0]["norms"]}


@pytest.mark.parametrize("number", range(6))
def test_configuration(setup, ranks, expected, number):
    method, world, flags, half = configuration(number)
    found, wanted = run(setup, ranks, method, world, flags), expected(method)
    for step, reference in zip(found["steps"], wanted["steps"], strict=True):
        assert step.keys() == reference.keys(), (method, flags)
        for metric in TOLERANCES.keys() & step.keys():
            slack = 0.05 * max(1.0, abs(reference[metric])) if half else TOLERANCES[metric]
            assert step[metric] == pytest.approx(reference[metric], abs=slack), (method, flags)
    slack = 0.1 if half else 1e-3
    assert found["norms"] == pytest.approx(wanted["norms"], rel=slack), (method, flags)
