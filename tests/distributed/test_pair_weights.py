"""Weights of pairs, and sources' values before fusion, through Megatron's training."""

import json
import math

import numpy as np
import pytest

from megatron_infifpo.references.logprob_store import LogprobStore
from megatron_infifpo.tokens.dataset import TokenDataset
from support.launcher import refused
from support.runs import steps_of

PROGRAM = "megatron_infifpo.train"


WHOLE = ["--global-batch-size", "20", "--micro-batch-size", "5", "--train-iters", "2"]
BEST = ["--pair-weights", "best-source"]
ENTRIES = (
    "{name: qwen, logprobs: qwen, accuracy: 0.6}",
    "{name: phi, logprobs: phi, domains: [code], accuracy: {code: 0.7}}",
)


def weights_by_hand(setup, means: bool) -> np.ndarray:
    """Of all records, with the usual scales, in plain floats."""
    tokens = TokenDataset(setup.data)
    stores = {name: LogprobStore(setup.folder / name) for name in ("qwen", "phi")}
    found = []
    for i in range(len(tokens)):
        store = stores["phi" if tokens.domain(i) == "code" else "qwen"]
        chosen, rejected = (
            float(total) / (int(count) if means else 1)
            for total, count in zip(store.sums(i)[:2], store.counts(i)[:2], strict=True)
        )
        found.append(1 / (1 + math.exp(-(25 if means else 1) * (chosen - rejected))))
    return np.array(found)


def run(setup, ranks, world: int, *more: str, name: str = "accurate") -> list[dict]:
    return ranks(
        world, "support.training:train", setup.flags(setup.sources(name, *ENTRIES), *WHOLE, *more)
    )


def test_dpo_starts_at_the_mean_weight_times_ln_2(setup, ranks):
    results = run(setup, ranks, 1, "--method", "dpo", *BEST)
    first, weights = steps_of(results)[0], weights_by_hand(setup, means=False)
    assert 0.01 < weights.std(), "they differ"
    assert first["pair-weight"] == pytest.approx(weights.mean(), abs=1e-6)
    assert first["loss"] == pytest.approx(weights.mean() * math.log(2), abs=1e-6)
    code = np.array([TokenDataset(setup.data).domain(i) == "code" for i in range(20)])
    assert first["domain/code/pair-weight"] == pytest.approx(weights[code].mean(), abs=1e-6)


def test_weighted_sft_by_hand(setup, ranks):
    """Each record's cross-entropy times its weight, over all tokens; the reference is not read."""
    more = ["--method", "sft", *BEST]
    results = run(setup, ranks, 1, *more)
    first, weights = steps_of(results)[0], weights_by_hand(setup, means=True)
    initial = LogprobStore(setup.folder / "initial")
    sums = np.array([initial.sums(i)[0] for i in range(20)])
    expected = -(weights * sums).sum() / initial.token_counts[:, 0].sum()
    assert first["loss"] == pytest.approx(expected, rel=1e-5)
    assert first["pair-weight"] == pytest.approx(weights.mean(), abs=1e-6)
    assert "reference check" not in ranks.logs[0]
    assert "pairs are weighted by best-source, verdicts with a scale of 25: mean" in ranks.logs[0]


@pytest.mark.parametrize(
    "more",
    [
        ["--method", "sft", *BEST],
        ["--method", "infifpo", "--pair-weights", "agreement",
         "--source-values", "standardised", "--sft-weight", "0.3"],
    ],
    ids=["sft", "infifpo"],
)  # fmt: skip
def test_two_ranks_train_as_one(setup, ranks, more):
    one, two = (run(setup, ranks, world, *more) for world in (1, 2))
    assert two[0]["norms"] == pytest.approx(one[0]["norms"], rel=1e-4)
    for got, expected in zip(steps_of(two), steps_of(one), strict=True):
        for name in ("loss", "pair-weight", "domain/code/loss"):
            assert got[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("method", ["sft", "infifpo"])
def test_a_weight_of_one_is_no_weight(setup, ranks, method):
    """To the bit: of weights that are all above the cut."""
    ones = run(
        setup, ranks, 1, "--method", method, "--pair-weights", "agreement", "--verdict-cut", "1e-30"
    )
    plain = setup.method_flags(method, *WHOLE, entries=ENTRIES)
    none = ranks(1, "support.training:train", plain)
    assert ones[0]["norms"] == none[0]["norms"]
    assert [s["loss"] for s in steps_of(ones)] == [s["loss"] for s in steps_of(none)]
    assert {s["pair-weight"] for s in steps_of(ones)} == {1.0}


def test_a_run_keeps_its_accuracies(setup, ranks, tmp_path):
    argv = setup.flags(setup.sources("accurate", *ENTRIES), *WHOLE, "--method", "dpo", *BEST)
    argv += ["--save", str(tmp_path / "run")]
    ranks(1, "support.training:train", [*argv, "--stop-at", "1"])
    found = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert found["method"]["pair_weights"] == "best-source"
    assert found["method"]["verdict_scale"] == 1.0
    assert found["source_accuracies"] == {"qwen": 0.6, "phi": {"code": 0.7}}
    setup.sources("accurate", ENTRIES[0].replace("0.6", "0.8"), ENTRIES[1])
    assert "source_accuracies.qwen is 0.8, but was 0.6" in refused(ranks, PROGRAM, argv)


def test_refusals(setup, ranks):
    unknown = setup.sources("unknown", "{name: qwen, logprobs: qwen, accuracy: {code: 0.6}}")
    said = refused(ranks, PROGRAM, setup.flags(unknown, *WHOLE, "--method", "dpo", *BEST))
    assert "in the domain 'general', and none of qwen has an accuracy there" in said
    argv = setup.method_flags("sft", *WHOLE, *BEST)
    assert "--preference-sources is missing" in refused(ranks, PROGRAM, argv)
    known = setup.flags(setup.sources("accurate", *ENTRIES), *WHOLE, "--method", "sft", *BEST)
    said = refused(ranks, PROGRAM, [*known, "--reference-check", "off"])
    assert "--reference-check has no effect with --method sft" in said
