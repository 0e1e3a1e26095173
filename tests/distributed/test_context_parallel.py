"""A row cut over ranks, which gather keys and values: the same losses, gradients, parameters.

Two ranks are one of the layouts that all methods and the scorer are tested at; here are the others,
and what meets a cut: windows, recomputation, a resume at another size.
"""

import json

import pytest

from megatron_infifpo.tokens.dataset import TokenDataset
from support.launcher import RankError
from support.runs import BOTH, steps_of

CP = "--context-parallel-size"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
FULL += ["--recompute-num-layers", "1"]
# name -> ranks, flags
LAYOUTS = {
    "cp4": (4, [CP, "4"]),
    "cp3-one-pair-a-row": (3, [CP, "3", "--micro-batch-size", "1"]),
    "cp2-tp2-sp": (4, [CP, "2", TP, "2", "--sequence-parallel"]),
    "cp2-pp2-vpp2": (4, [CP, "2", PP, "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "cp2-dp2": (4, [CP, "2", "--overlap-grad-reduce", "--overlap-param-gather"]),
    "cp2-recomputed": (2, [CP, "2", *FULL]),
    "cp2-mlp": (2, [CP, "2", "--recompute-modules", "core_attn", "mlp"]),
    "cp2-two-prompts": (2, [CP, "2", "--no-share-prompt"]),
}


@pytest.fixture(scope="module")
def run(setup, ranks):
    """Some steps: metrics of each, evaluations, and the gradient norms."""
    sources = setup.sources("both", *BOTH)

    def run(world: int, *flags: str) -> dict:
        results = ranks(world, "support.training:train", setup.flags(sources, *flags))
        found = {"steps": steps_of(results), "norms": results[0]["norms"]}
        return found | {"evaluations": max((r["evaluations"] for r in results), key=bool)}

    return run


@pytest.fixture(scope="module")
def expected(run):
    """Three steps on one rank."""
    return run(1)


def assert_same(found: dict, wanted: dict) -> None:
    for kind in ("steps", "evaluations"):
        for step, reference in zip(found[kind], wanted[kind], strict=True):
            assert step.keys() == reference.keys()
            for name, value in reference.items():
                # Ties at the start; waste is the layout's.
                if not name.endswith("rewards/accuracy") and not name.startswith("waste/"):
                    close = pytest.approx(value, abs=1e-4, rel=1e-5, nan_ok=True)
                    assert step[name] == close, name
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(run, expected, layout):
    world, flags = LAYOUTS[layout]
    assert_same(run(world, *flags), expected)


@pytest.mark.parametrize("family", ["gemma3", "mistral-window", "phi3-partial", "olmo3"])
def test_families(run, pivots, family):
    """Windows that a cut runs through, two ropes, partial rotation."""
    _, pivot = pivots(family)
    other = ["--pretrained-checkpoint", str(pivot), "--tokenizer-check", "warn"]
    other += ["--reference-check", "off", "--train-iters", "2"]
    assert_same(run(2, CP, "2", *other), run(1, *other))


def test_evaluation(setup, run):
    """Held-out pairs, before and after steps."""
    sources = setup.sources("both", *BOTH)
    valid = ["--preference-valid-data", str(setup.data), "--preference-valid-sources", str(sources)]
    valid += ["--eval-interval", "1", "--train-iters", "2"]
    found, wanted = run(2, CP, "2", *valid), run(1, *valid)
    assert wanted["evaluations"]
    assert_same(found, wanted)


@pytest.mark.parametrize(("before", "after"), [((2, "1"), (2, "2")), ((4, "2"), (1, "1"))])
def test_resumed_at_another_size(run, expected, tmp_path, before, after):
    """Optimizer state is that of ranks that share gradients: data and context parallel ones."""
    save = ["--save", str(tmp_path), "--save-interval", "2"]
    run(before[0], CP, before[1], *save, "--exit-interval", "2")
    resumed = run(after[0], CP, after[1], *save)
    third = {name: values[2:] for name, values in expected.items() if name != "evaluations"}
    assert_same(resumed, third | {"evaluations": []})


def test_ranks_without_a_scored_token(setup, ranks, tmp_path):
    """Long prompts and short answers: most ranks have nothing to score, and take part."""
    records = tmp_path / "short.jsonl"
    pairs = [
        {"id": str(i), "prompt": f"why {i} " * 20, "chosen": "yes", "rejected": "no"}
        for i in range(8)
    ]
    records.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    prepare = ["--input", str(records), "--tokenizer", str(setup.hf)]
    prepare += ["--output", str(tmp_path / "short")]
    ranks(1, "support.tools:run_tool", "prepare_preferences", prepare)
    tokens = TokenDataset(tmp_path / "short")
    argv = setup.method_flags("sft", "--preference-data", str(tmp_path / "short"))
    found = [
        ranks(world, "support.training:train", [*argv, CP, str(world), "--micro-batch-size", "1"])
        for world in (1, 4)
    ]
    assert len(tokens.prompt_ids(0)) > 20 * tokens.scored_lengths[0, 0]
    assert found[1][0]["norms"] == pytest.approx(found[0][0]["norms"], rel=1e-4)
    losses = [[step["loss"] for step in steps_of(results)] for results in found]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_said(run, ranks):
    """What is computed again without being asked for."""
    said = "attention is computed again in the backward pass"
    run(2, CP, "2", "--train-iters", "1")
    assert said in ranks.logs[0]
    run(2, CP, "2", "--train-iters", "1", *FULL)
    assert said not in ranks.logs[0]


def test_refused(run, ranks):
    with pytest.raises(RankError):
        run(2, CP, "4")
    said = "tensor x pipeline x context parallel groups of 1 x 1 x 4"
    assert said in "\n".join(ranks.logs)  # whichever rank is first
