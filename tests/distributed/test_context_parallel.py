"""A row cut over ranks, which gather keys and values: the same losses, gradients, parameters.

Two ranks are one of the layouts that all methods and the scorer are tested at; here are the others,
and what meets a cut: windows, recomputation, a resume at another size.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_infifpo.methods import METHODS
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.layout import RowLayout
from megatron_infifpo.rows.plan import plan_step
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.tokens.dataset import TokenDataset
from support.launcher import RankError
from support.runs import BOTH, EPSILON, saved, steps_of

CP = "--context-parallel-size"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
FULL += ["--recompute-num-layers", "1"]
# name -> ranks, flags
LAYOUTS = {
    "cp4": (4, [CP, "4"]),
    "cp3-one-pair-a-row": (3, [CP, "3", "--micro-batch-size", "1"]),
    "cp2-tp2-sp": (4, [CP, "2", TP, "2", "--sequence-parallel"]),
    "cp2-pp2": (4, [CP, "2", PP, "2"]),
    "cp2-pp2-vpp2": (4, [CP, "2", PP, "2", "--num-virtual-stages-per-pipeline-rank", "2"]),
    "cp2-dp2": (4, [CP, "2", "--overlap-grad-reduce", "--overlap-param-gather"]),
    "cp2-recomputed": (2, [CP, "2", *FULL]),
    "cp2-mlp": (2, [CP, "2", "--recompute-modules", "core_attn", "mlp"]),
    "cp2-two-prompts": (2, [CP, "2", "--no-share-prompt"]),
}


@pytest.fixture(scope="module")
def run(setup, ranks, tmp_path_factory):
    """Some steps: metrics of each, evaluations, the gradient norms, and the parameters then."""
    sources = setup.sources("both", *BOTH)

    def run(world: int, *flags: str, save: Path | None = None) -> dict:
        folder, light = save or tmp_path_factory.mktemp("run"), [] if save else ["--no-save-optim"]
        argv = setup.flags(sources, "--save", str(folder), *EPSILON, *light, *flags)
        results = ranks(world, "support.training:train", argv)
        found = {"steps": steps_of(results), "norms": results[0]["norms"]}
        found["evaluations"] = max((r["evaluations"] for r in results), key=bool)
        return found | {"parameters": saved(folder)}

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
    assert_same_parameters(found["parameters"], wanted["parameters"])


def assert_same_parameters(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value, other in both(found, wanted):
        # Measured: 8e-6, after three steps of 1e-3.
        torch.testing.assert_close(value, other, atol=5e-5, rtol=0, msg=name)


def both(found: dict, wanted: dict) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Parameters of two runs; tensor parallelism may pad the vocabulary further."""
    for name, value in found.items():
        rows = min(len(value), len(wanted[name]))
        yield name, value[:rows].float(), wanted[name][:rows].float()


def distance(found: dict, wanted: dict) -> float:
    """Norm of the difference of two runs' parameters."""
    pairs = both(found["parameters"], wanted["parameters"])
    return math.sqrt(sum(float((a - b).double().square().sum()) for _, a, b in pairs))


def planned_waste(setup, world: int, flags: list[str]) -> list[dict[str, float]]:
    """What each of three steps wastes, counted row by row from the lengths of pairs."""

    def given(name: str, usual: int) -> int:
        return int(flags[flags.index(name) + 1]) if name in flags else usual

    context, tensor, pairs = given(CP, 1), given(TP, 1), given("--micro-batch-size", 2)
    data = world // (context * tensor * given(PP, 1))
    sources = read_sources(setup.sources("both", *BOTH))
    dataset = PreferenceDataset.for_method(METHODS["infifpo"], setup.data, sources)
    layout = RowLayout(share_prompt="--no-share-prompt" not in flags)
    lengths = dataset.pair_lengths(layout)[dataset.require_eligible(256)]
    found = []
    for step in range(3):
        plan = plan_step(
            lengths, seed=1234, step=step, global_batch_size=8, data_parallel_size=data,
            num_microbatches=8 // (data * pairs),
        )  # fmt: skip
        texts = [[int(lengths[row].sum()) for row in rows] for rows in plan]
        # Room for pieces that differ by two tokens, and then equal shares of all ranks.
        each = context * tensor
        padded = [sum(-(-(n + 2 * context - 2) // each) * each for n in rows) for rows in texts]
        found.append(
            {
                "waste/padding": 1 - sum(map(sum, texts)) / sum(padded),
                "waste/imbalance": 1 - sum(padded) / (data * max(padded)),
            }
        )
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(setup, run, expected, layout):
    world, flags = LAYOUTS[layout]
    found = run(world, *flags)
    assert_same(found, expected)
    for step, waste in zip(found["steps"], planned_waste(setup, world, flags), strict=True):
        assert waste["waste/padding"] > 0
        assert {name: step[name] for name in waste} == pytest.approx(waste, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("gemma3", [2]), ("mistral-window", [2, 4]), ("phi3-partial", [2]), ("olmo3", [2])],
)
def test_families(run, pivots, family, sizes):
    """Windows that a cut runs through, two ropes, partial rotation."""
    _, pivot = pivots(family)
    other = ["--pretrained-checkpoint", str(pivot), "--tokenizer-check", "warn"]
    other += ["--reference-check", "off", "--train-iters", "2"]
    wanted = run(1, *other)
    for size in sizes:
        assert_same(run(size, CP, str(size), *other), wanted)


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
    often = ["--save-interval", "2"]
    run(before[0], CP, before[1], *often, "--exit-interval", "2", save=tmp_path)
    resumed = run(after[0], CP, after[1], *often, save=tmp_path)
    third = {name: expected[name][2:] for name in ("steps", "norms")}
    assert_same(resumed, expected | third)


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
    argv = setup.method_flags("sft", "--preference-data", str(tmp_path / "short"), *EPSILON)
    found = []
    for world in (1, 4):
        save = ["--save", str(tmp_path / str(world)), "--no-save-optim"]
        cut = [CP, str(world), "--micro-batch-size", "1", *save]
        found.append(ranks(world, "support.training:train", [*argv, *cut]))
    assert len(tokens.prompt_ids(0)) > 20 * tokens.scored_lengths[0, 0]
    assert found[1][0]["norms"] == pytest.approx(found[0][0]["norms"], rel=1e-4)
    losses = [[step["loss"] for step in steps_of(results)] for results in found]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert_same_parameters(*(saved(tmp_path / str(world)) for world in (4, 1)))


# Two runs that round to 8 bits differ by as much as each differs from float32. Measured: losses
# 0.010 (CP 2 or 4, from one rank) and 0.013 (one rank, from float32), mean log-probs of about 7
# nats 0.014 and 0.027, norms 0.012 and 0.009 of themselves.
BF16_LOSS, BF16_LOGPS, BF16_NORM = 0.03, 0.06, 0.03


def test_bf16(run, expected):
    """Two and four ranks, beside one, in bfloat16: no farther from it than float32 is."""
    one = run(1, "--bf16")
    rounding = distance(one, expected)
    assert rounding > 0.01, "nothing was rounded"
    for size in (2, 4):
        found = run(size, CP, str(size), "--bf16")
        for step, reference in zip(found["steps"], one["steps"], strict=True):
            assert step["loss"] == pytest.approx(reference["loss"], abs=BF16_LOSS)
            for name in ("logps/chosen", "logps/rejected"):
                assert step[name] == pytest.approx(reference[name], abs=BF16_LOGPS), name
        assert found["norms"] == pytest.approx(one["norms"], rel=BF16_NORM)
        assert distance(found, one) < rounding


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
