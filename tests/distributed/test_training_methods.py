"""Every method through Megatron's training: layouts, first losses, WRPO's schedule, SFT."""

import json
import math

import pytest

from megatron_infifpo.losses import LOSSES
from megatron_infifpo.methods import METHODS, add_method_flags, method_from_options
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.rows.packing import collate
from megatron_infifpo.rows.preference_dataset import PreferenceDataset
from megatron_infifpo.training.objective import pair_losses
from support.runs import BOTH, LAYOUTS, steps_of

# Standardised values of a random model lie close together, and the sign of a difference is all that
# an L1 distance goes by: each layout's rounding is another run after a few large steps. A KL is a
# difference of sums of some hundreds of nats, in which such steps leave 1e-4, too.
SLOWER = {"infifusion": ("--lr", "1e-5"), "fuserlhf": ("--lr", "1e-4")}


@pytest.fixture(scope="module")
def one_rank(setup, ranks):
    return {
        method: ranks(
            1, "support.training:train", setup.method_flags(method, *SLOWER.get(method, ()))
        )
        for method in ("sft", "wrpo", "infifpo-wrpo", "fuserlhf", "pad", "fusellm", "infifusion")
    }


# infifpo-wrpo differs from wrpo in its reference only, which infifpo's own tests cover.
METHOD_LAYOUTS = [
    (m, layout)
    for m in ("sft", "wrpo", "fuserlhf", "pad")
    for layout in ("tp2", "pp2", "dp2", "tp2-sp")
]
METHOD_LAYOUTS += [(m, "tp2-pp2") for m in ("sft", "wrpo", "infifpo-wrpo", "fuserlhf")]
METHOD_LAYOUTS += [("fuserlhf", "pp2-vpp2")]
# Losses of tokens differ in what the head gives them, which tensor parallelism splits.
METHOD_LAYOUTS += [("fusellm", layout) for layout in ("pp2", "dp2", "tp2-sp", "tp2-pp2")]
METHOD_LAYOUTS += [("infifusion", layout) for layout in ("tp2", "pp2", "dp2", "tp2-sp")]
# Ranks hold parts of a response, of a chunk of tokens, of a list.
METHOD_LAYOUTS += [(m, "cp2") for m in ("sft", "wrpo", "fuserlhf", "fusellm", "infifusion")]


def assert_agree(got: list[dict], expected: list[dict]) -> None:
    """Two runs of three steps: norms within 1e-4 of each other, and metrics within 1e-4."""
    assert len(expected[0]["norms"]) == 3
    assert got[0]["norms"] == pytest.approx(expected[0]["norms"], rel=1e-4)
    for step, reference in zip(steps_of(got), steps_of(expected), strict=True):
        assert set(step) == set(reference)
        for name, value in reference.items():
            # Ties at the start; waste is the layout's.
            if not name.endswith("rewards/accuracy") and not name.startswith("waste/"):
                # The variance of summed log-probs is some tens, of numbers with seven digits.
                close = pytest.approx(value, abs=1e-4, rel=1e-5, nan_ok=True)
                assert step[name] == close, name


@pytest.mark.parametrize("method, layout", METHOD_LAYOUTS)
def test_layouts_agree(setup, ranks, one_rank, method, layout):
    world, flags = LAYOUTS[layout]
    argv = setup.method_flags(method, *flags, *SLOWER.get(method, ()))
    assert_agree(ranks(world, "support.training:train", argv), one_rank[method])


def test_layouts_agree_with_tied_embeddings(setup, ranks, pivots):
    """The head's weight is the embedding, of which pipeline stages keep two copies."""
    argv = setup.method_flags("fusellm", "--pretrained-checkpoint", str(pivots("llama-tied")[1]))
    expected = ranks(1, "support.training:train", argv)
    for layout in ("tp2-sp", "tp2-pp2"):
        world, flags = LAYOUTS[layout]
        assert_agree(ranks(world, "support.training:train", [*argv, *flags]), expected)


def expected_first_loss(setup, argv: list[str]) -> float:
    """Mean loss of all pairs where the policy is the initial pivot, from the datasets alone."""
    import argparse

    parser = argparse.ArgumentParser()
    add_method_flags(parser)
    args = parser.parse_args(argv)
    method = method_from_options(args.method, vars(args))
    job = setup.lists if method.responses is None else setup
    sources = read_sources(job.sources("both", *BOTH))
    data = PreferenceDataset.for_method(method, job.data, sources)
    row = collate([data[i] for i in range(len(data))])
    losses, _, _ = pair_losses(method, row, row["initial_sum_logps"], progress=0.0)
    return losses.mean().item()


OPTIONS = {
    "robust": ["--label-smoothing", "0.2"],
    "exo_pair": ["--label-smoothing", "0.1"],
    "aot": ["--label-smoothing", "0.1", "--sft-weight", "0.5"],
    "discopop": ["--discopop-tau", "0.3"],
    "wrpo": ["--alpha", "0.4"],
    "dpo": ["--fusion", "confidence", "--initial-as-source", "--label-smoothing", "0.1"],
    "hinge": ["--margin-space", "log-prob", "--margin-anchor", "initial", "--selection", "pair"],
    "aot_unpaired": ["--label-smoothing", "0.2"],
    "group_regression": ["--reward-normalization", "group", "--reward-scale", "0.5"],
    "plackett_luce": ["--divergence", "jsd", "--no-clip"],
}
PREFERENCE = [name for name, method in METHODS.items() if method.loss is not None]
CASES = [["--method", name] for name in PREFERENCE]
CASES += [["--objective", name, *OPTIONS.get(name, [])] for name in LOSSES]


@pytest.mark.parametrize("argv", CASES, ids=lambda argv: argv[1] + ("" if len(argv) < 3 else "+"))
def test_first_loss_follows_from_the_datasets(setup, ranks, argv):
    """Training computes what the datasets and `pair_losses` say, whose options are tested there."""
    whole = ["--global-batch-size", "20", "--micro-batch-size", "20", "--train-iters", "1"]
    lists = METHODS.get(argv[1]) or LOSSES[argv[1]]
    job = setup.lists if lists.responses is None else setup
    flags = job.flags(job.sources("both", *BOTH), *whole, *argv)
    first = steps_of(ranks(1, "support.training:train", flags))[0]
    assert first["loss"] == pytest.approx(expected_first_loss(setup, argv), abs=1e-5, rel=1e-5)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", PREFERENCE)
def test_finite_differences_of_the_whole_loss(ranks, name, world):
    """Hidden states to loss: head, sums, fusion and objective, the vocabulary split or not."""
    options = {} if METHODS[name].responses is None else {"sft_weight": 0.2}
    for results in ranks(world, "support.heads:whole_loss_gradients", name, options):
        assert len(results) > 25
        for gradient, difference in results:
            assert gradient == pytest.approx(difference, abs=1e-7, rel=1e-6)


def test_alpha_grows_over_training_and_survives_resume(setup, ranks, tmp_path):
    schedule = ["--save-interval", "3", "--train-iters", "6", "--alpha", "0.6"]

    def run(name, *more):
        save = ["--save", str(tmp_path / name), *schedule, *more]
        return steps_of(ranks(2, "support.training:train", setup.method_flags("wrpo", *save)))

    whole = run("whole")
    assert [step["alpha"] for step in whole] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    first, rest = run("half", "--exit-interval", "3"), run("half")
    assert [step["loss"] for step in first + rest] == [step["loss"] for step in whole]
    assert [step["alpha"] for step in rest] == pytest.approx([0.3, 0.4, 0.5])


def test_metrics_of_domains_and_sources(setup, ranks):
    """Domain metrics are means over their pairs; a source outside its domain has no share there."""
    flags = setup.flags(
        setup.sources("both", *BOTH), "--global-batch-size", "20", "--train-iters", "1"
    )
    step = steps_of(ranks(1, "support.training:train", flags))[0]
    records = [json.loads(line) for line in open(setup.records)]
    code = sum(r["domain"] == "code" for r in records) / len(records)
    for name in ("loss", "logps/margin", "share/qwen"):
        mean = code * step[f"domain/code/{name}"] + (1 - code) * step[f"domain/general/{name}"]
        assert step[name] == pytest.approx(mean, abs=1e-5), name
    assert step["domain/general/share/phi"] == 0.0
    assert step["domain/general/share/qwen"] == 1.0
    assert 0 < step["domain/code/share/phi"] < 1


def test_held_out_pairs_with_domains_in_another_order(setup, ranks, tmp_path):
    """Names are those of the pairs, whichever domain came first in either file."""
    lines = setup.records.read_text().splitlines()
    records = tmp_path / "valid.jsonl"
    general_first = [lines[1], lines[2], lines[0], *lines[3:8]]
    records.write_text("\n".join(general_first) + "\n")
    prepare = ["--input", str(records), "--tokenizer", str(setup.hf)]
    ranks(
        1,
        "support.tools:run_tool",
        "prepare_preferences",
        [*prepare, "--output", str(tmp_path / "v")],
    )
    models = {"initial": setup.pivot, "qwen": setup.folder / "qwen", "phi": setup.folder / "phi"}
    for name, model in models.items():
        flags = ["--backend", "megatron", "--model", str(model), "--input", str(records)]
        ranks(1, "support.scoring:score", [*flags, "--output", str(tmp_path / name)])
    sources = tmp_path / "sources.yaml"
    entries = "".join(f"\n  - {entry}" for entry in BOTH)
    sources.write_text(f"initial: initial\nsources:{entries}\n")
    valid = ["--preference-valid-data", str(tmp_path / "v")]
    valid += ["--preference-valid-sources", str(sources)]
    flags = setup.flags(setup.sources("both", *BOTH), "--train-iters", "1", *valid)
    evaluation = ranks(1, "support.training:train", flags)[0]["evaluations"][0]
    assert evaluation["domain/general/share/phi"] == 0.0
    assert evaluation["domain/code/share/phi"] > 0.0


def test_two_stages(setup, ranks, tmp_path):
    """SFT, then preference optimization from its checkpoint, whose scores are the initial ones."""
    sft = tmp_path / "sft"
    stage = ["--save", str(sft), "--save-interval", "3", "--preference-epochs", "1"]
    argv = setup.method_flags("sft", *stage)
    position = argv.index("--train-iters")
    ranks(1, "support.training:train", argv[:position] + argv[position + 2 :])
    inputs = ["--input", str(setup.records), "--output", str(tmp_path / "initial")]
    ranks(1, "support.scoring:score", ["--backend", "megatron", "--model", str(sft), *inputs])
    sources = tmp_path / "sources.yaml"
    sources.write_text("initial: initial\nsources: [{name: own, logprobs: initial}]\n")
    flags = ["--pretrained-checkpoint", str(sft), "--preference-sources", str(sources)]
    first = steps_of(ranks(1, "support.training:train", setup.flags(sources, *flags)))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
