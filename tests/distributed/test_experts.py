"""Models with experts: every layout trains alike, and losses on routers are scaled right.

The layouts that are not here were run once: docs/lab-log.md.
"""

import json

import pytest
import torch

from megatron_infifpo.engine.kept import ON_CPU
from megatron_infifpo.errors import UserError
from megatron_infifpo.training.experts import expert_arguments
from support.experts import router_gradients
from support.launcher import RankError
from support.runs import BOTH, EPSILON, exported, steps_of

TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CP, EP = "--context-parallel-size", "--expert-model-parallel-size"
ETP, SP = "--expert-tensor-parallel-size", "--sequence-parallel"
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
SHARED = ("--recompute-granularity", "selective", "--recompute-modules", "shared_experts")
# name -> ranks, flags
LAYOUTS = {
    "ep2-overlap": (2, [EP, "2", *OVERLAP]),
    "tp2-etp2": (2, [TP, "2", SP, ETP, "2"]),
    "cp2-ep2": (2, [CP, "2", EP, "2", "--recompute-modules", "core_attn", "moe"]),
    "pp2-ep2": (4, [PP, "2", EP, "2"]),
    "pp2-ep2-shared": (4, [PP, "2", EP, "2", *SHARED]),
    "tp2-ep4": (4, [TP, "2", SP, EP, "4"]),
}


@pytest.fixture(scope="module")
def flags(setup, pivots):
    """Command line of three steps of a family."""
    sources = setup.sources("both", *BOTH)

    def flags(family: str, *more: str) -> list[str]:
        _, pivot = pivots(family)
        argv = ["--pretrained-checkpoint", str(pivot), "--tokenizer-check", "warn"]
        return setup.flags(sources, *argv, "--reference-check", "off", *EPSILON, *more)

    return flags


@pytest.fixture(scope="module")
def run(flags, ranks, tmp_path_factory):
    """Losses and gradient norms of three steps, and the parameters after them."""
    folder = tmp_path_factory.mktemp("experts")

    def run(name: str, family: str, world: int, *more: str) -> tuple[list, list, dict]:
        save = folder / f"{family}-{name}"
        argv = flags(family, "--save", str(save), *more)
        results = ranks(world, "support.training:train", argv)
        losses = [step["loss"] for step in steps_of(results)]
        return losses, results[0]["norms"], exported(ranks, save, folder / f"{family}-{name}-hf")

    return run


@pytest.fixture(scope="module")
def expected(run):
    """Three steps on one rank, by family."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = run("one", family, 1)
        return made[family]

    return get


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        *(("qwen3_moe", layout) for layout in LAYOUTS if layout != "pp2-ep2-shared"),
        ("qwen3_moe-mixed", "pp2-ep2"),
        ("mixtral", "tp2-ep4"),
        ("qwen2_moe", "pp2-ep2-shared"),
        ("gpt_oss", "ep2-overlap"),
    ],
)
def test_layouts(run, expected, family, layout):
    world, more = LAYOUTS[layout]
    losses, norms, parameters = run(layout, family, world, *more)
    wanted = expected(family)
    assert losses == pytest.approx(wanted[0], abs=1e-5)
    assert norms == pytest.approx(wanted[1], rel=1e-5)
    assert parameters.keys() == wanted[2].keys()
    for name, value in parameters.items():
        torch.testing.assert_close(value, wanted[2][name], atol=1e-4, rtol=1e-5, msg=name)


def test_shared_experts_computed_again(flags, pivots, ranks):
    """Their layers keep less: what is inside of them, their output and its gate."""
    config = json.loads((pivots("qwen2_moe")[0] / "config.json").read_text())
    (whole,) = ranks(1, "support.training:kept_bytes", flags("qwen2_moe"))
    (less,) = ranks(1, "support.training:kept_bytes", flags("qwen2_moe", *SHARED))
    saved = (whole["kept"] - less["kept"]) / whole["tokens"] / config["num_hidden_layers"]
    inside = ON_CPU.mlp * config["shared_expert_intermediate_size"]
    assert saved == pytest.approx(4 * (inside + config["hidden_size"]), rel=0.02)


@pytest.mark.parametrize(
    ("sizes", "part", "lacking"),
    [
        ((0, None, 1), "moe", "experts"),
        ((0, None, 1), "shared_experts", "shared experts"),
        ((8, None, [1, 1]), "shared_experts", "shared experts"),
        ((8, 64, [1, 1]), "mlp", "an MLP beside its experts"),
    ],
)
def test_parts_that_no_layer_has(sizes, part, lacking):
    names = ("num_experts", "moe_shared_expert_intermediate_size", "moe_layer_freq")
    given = dict(zip(names, sizes, strict=True)) | {"recompute_modules": ["core_attn", part]}
    with pytest.raises(UserError, match=f"modules {part} has no effect: .* has {lacking}; leave"):
        expert_arguments(given)


def test_probes_in_step(flags, ranks):
    """One record to look at, and two ranks that share experts: the other has something to run."""
    check = ["--reference-check", "warn", "--reference-probes", "1"]  # the last one counts
    argv = flags("qwen3_moe", EP, "2", "--train-iters", "1", *check)
    ranks(2, "support.training:train", argv)
    assert "on 1 of 1 records" in ranks.logs[0]


AUXILIARY, Z = 0.7, 0.02


@pytest.mark.parametrize(
    ("method", "world", "more"),
    [
        ("sft", 1, []),
        ("dpo", 1, []),
        ("dpo", 2, [EP, "2"]),
        ("sft", 2, [TP, "2", SP]),
        ("dpo", 2, [PP, "2"]),
    ],
    ids=["sft", "dpo", "dpo-ep2", "sft-tp2", "dpo-pp2"],
)
def test_losses_on_routers(setup, ranks, pivots, tmp_path, method, world, more):
    """What they add to the gradient is what transformers and autograd have, of unequal rows."""
    hf, pivot = pivots("qwen3_moe")
    lr, found = 1.0, []
    coefficients = ["--moe-aux-loss-coeff", str(AUXILIARY), "--moe-z-loss-coeff", str(Z)]
    for number, losses in enumerate(([], coefficients)):
        argv = setup.method_flags(
            method, "--pretrained-checkpoint", str(pivot), "--tokenizer-check", "warn",
            "--train-iters", "1", "--optimizer", "sgd", "--sgd-momentum", "0", "--lr", str(lr),
            "--weight-decay", "0", "--clip-grad", "0", "--save", str(tmp_path / str(number)),
            *more, *losses,
        )  # fmt: skip
        argv.remove("--use-distributed-optimizer")
        argv += [] if method == "sft" else ["--reference-check", "off", "--no-share-prompt"]
        rows = ranks(world, "support.experts:train_noting_rows", argv)
        found.append(exported(ranks, tmp_path / str(number), tmp_path / f"{number}-hf"))
    # Of ranks that split a model each has all rows.
    trained = [row for rank in (rows if EP in more else rows[:1]) for row in rank]
    assert len(trained) == 4 and len({sum(map(len, row)) for row in trained}) > 1
    wanted = router_gradients(hf, trained, AUXILIARY, Z)
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 0.01
    for name, gradient in wanted.items():
        got = (found[0][name] - found[1][name]) / lr
        torch.testing.assert_close(got, gradient, atol=1e-5 * largest, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("family", "world", "more", "sentence"),
    [
        ("qwen3_moe", 2, [TP, "2"], "--sequence-parallel for a model with experts"),
        ("qwen3_moe", 3, [EP, "3"], "expected one of 1, 2, 4, 8: it must divide the model's 8"),
        ("qwen3_moe", 1, [ETP, "7"], "expected one of 1, 2, 4, 5, 8, 10, 20, 40: it must divide"),
        ("qwen3_moe", 2, [EP, "4"], "2 ranks cannot be split into expert x expert tensor x pipe"),
        ("llama", 2, [EP, "2"], "--expert-model-parallel-size is 2, but the model has no experts"),
        ("llama", 1, ["--moe-aux-loss-coeff", "0.1"], "--moe-aux-loss-coeff has no effect"),
        ("llama", 1, ["--num-experts", "4"], "--num-experts is 4, but the checkpoint in"),
        ("qwen3_moe", 1, ["--moe-aux-loss-coeff", "1", "2"], "expected one number of at least 0"),
        ("qwen3_moe", 1, ["--mlp-chunks-for-training", "2"], "does not go with experts"),
    ],
)
def test_refused(flags, ranks, family, world, more, sentence):
    with pytest.raises(RankError) as failure:
        ranks(world, "support.training:train", flags(family, *more))
    assert sentence in "".join(failure.value.logs)


MODEL, SCHEDULE = "qwen3_moe", ["--save-interval", "3", "--train-iters", "6"]
BY_NAME = "--dist-ckpt-optim-fully-reshardable"
EP2 = (2, [EP, "2"])


@pytest.fixture(scope="module")
def resume(flags, ranks, tmp_path_factory):
    """Train six steps, or three and then three on other ranks; losses and norms of the last."""

    def resume(first: tuple[int, list[str]], then: tuple[int, list[str]] | None, *more: str):
        save = ["--save", str(tmp_path_factory.mktemp("resumed") / "run"), *SCHEDULE]
        (world, layout), stop = first, [*more, "--exit-interval", "3"] if then else []
        results = ranks(world, "support.training:train", flags(MODEL, *save, *layout, *stop))
        if then:
            world, layout = then
            results = ranks(world, "support.training:train", flags(MODEL, *save, *layout))
        losses = [step["loss"] for step in steps_of(results)]
        return losses[-3:], results[0]["norms"][-3:]

    return resume


@pytest.mark.parametrize("then", ["tp2-ep4", "pp2-ep2"])
def test_resumed_on_other_ranks(resume, then):
    """Optimizer state of experts that two ranks shared."""
    whole = resume(EP2, None)
    for values, expected in zip(resume(EP2, LAYOUTS[then], BY_NAME), whole, strict=True):
        assert values == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("then", "more", "sentence"),
    [
        ((2, [TP, "2", SP]), [], "expert model parallel size was 2 and is 1"),
        ((2, []), [BY_NAME], "the optimizer's state of experts was apart and is with all other"),
        ((2, [TP, "2", SP, ETP, "2"]), [BY_NAME], "apart and is with all other"),
    ],
)
def test_state_that_does_not_fit(resume, then, more, sentence):
    """By rank it is for those alone; by name for all layouts that keep experts apart."""
    with pytest.raises(RankError) as failure:
        resume(EP2, then, *more)
    said = "".join(failure.value.logs)
    assert sentence in said and "--no-load-optim" in said and "errors.UserError: " in said


def test_resumed_as_it_was(resume):
    assert resume(EP2, EP2) == resume(EP2, None)
