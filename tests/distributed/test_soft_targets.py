"""Training on soft targets: SFT is its one end, and what it reads of others is refused."""

import json
import shutil

import numpy as np
import pytest

from megatron_infifpo.methods import METHODS, resolve
from megatron_infifpo.references.soft_targets import SoftTargetStore
from support.launcher import RankError
from support.runs import steps_of
from support.soft_targets import write_soft_targets

SIX = ["--train-iters", "6", "--global-batch-size", "8"]


@pytest.fixture(scope="module")
def train(setup, ranks):
    """Train by a method; return steps, gradient norms and evaluations."""

    def run(method, *flags, world=1):
        argv = setup.method_flags(method, *flags)
        results = ranks(world, "support.training:train", argv)
        return steps_of(results), results[0]["norms"], results[0]["evaluations"]

    return run


@pytest.mark.parametrize(
    ("method", "flag"),
    [("fusellm", "--lm-weight=1"), ("fusechat", "--lm-weight=1"), ("infifusion", "--uld-weight=0")],
)
def test_cross_entropy_alone_is_sft_bit_by_bit(train, method, flag):
    expected, norms, _ = train("sft")
    found, same_norms, _ = train(method, flag)
    assert same_norms == norms
    for step, reference in zip(found, expected, strict=True):
        for name in ("loss", "logps/chosen", "domain/code/loss"):
            assert step[name] == reference[name], name
        assert step["ce"] == pytest.approx(step["loss"]) and step["distance"] > 0


def test_first_step_is_what_the_targets_say(train, setup):
    """Every part of the loss, from the stored targets and the log-probs that metrics have."""
    whole = ["--global-batch-size", "20", "--micro-batch-size", "20", "--train-iters", "1"]
    parts = train("fusellm", *whole, "--lm-weight", "0.3", "--chunk-weight", "2")[0][0]
    store = SoftTargetStore(setup.soft_targets("fusellm"))
    lengths = [len(store.take(i, 0, n).sources) for i, n in enumerate(scored_lengths(setup))]
    targets = [store.take(i, 0, n) for i, n in enumerate(lengths)]
    taught = sum(int((t.sources > 0).sum()) for t in targets)
    chunks = sum(len(t.chunks) for t in targets)
    assert parts["taught"] == pytest.approx(taught / sum(lengths), abs=1e-6)
    ones = sum(int((t.sources == 1).sum()) for t in targets)
    assert parts["share/qwen"] == pytest.approx(ones / taught, abs=1e-6)
    assert parts["share/initial"] == pytest.approx(1 - ones / taught, abs=1e-6)
    # ce is a mean over all tokens, so what teaching takes away from it is not in one number.
    plain = train("fusellm", *whole, "--lm-weight", "1")[0][0]
    light = train("fusellm", *whole, "--lm-weight", "0")[0][0]
    heavy = train("fusellm", *whole, "--lm-weight", "0", "--chunk-weight", "0")[0][0]
    total = sum(lengths)
    assert light["loss"] - heavy["loss"] == pytest.approx(parts["chunk"] * chunks / total, abs=1e-5)
    expected = 0.3 * plain["loss"] + 0.7 * (light["loss"] + parts["chunk"] * chunks / total)
    assert parts["loss"] == pytest.approx(expected, abs=1e-5)


def scored_lengths(setup) -> list[int]:
    from megatron_infifpo.tokens.dataset import TokenDataset

    return TokenDataset(setup.data).scored_lengths[:, 0].tolist()


def test_groups_of_ids(train, setup, tmp_path):
    """Groups of one id are that id; larger ones sum probabilities, and split over ranks alike."""
    groups = [np.array([5]), np.array([61])]
    plain = write_soft_targets(setup.data, tmp_path / "one", resolve("fusellm"), groups=groups)
    found, norms, _ = train("fusellm", "--soft-targets", str(plain))
    larger = [np.array([5, 6, 7, 8, 9, 10, 11]), np.array([61, 80, 1])]
    many = write_soft_targets(setup.data, tmp_path / "many", resolve("fusellm"), groups=larger)
    one, one_norms, _ = train("fusellm", "--soft-targets", str(many))
    two = ["--tensor-model-parallel-size", "2"]
    split, split_norms, _ = train("fusellm", "--soft-targets", str(many), *two, world=2)
    assert split_norms == pytest.approx(one_norms, rel=1e-4)
    assert [s["loss"] for s in split] == pytest.approx([s["loss"] for s in one], abs=1e-4)
    # Targets of more ids are easier to meet.
    assert one[0]["distance"] < found[0]["distance"] and one_norms != norms


@pytest.mark.parametrize("method", ["fusellm", "infifusion"])
def test_resume(train, tmp_path, method):
    schedule = ["--save-interval", "3", *SIX]
    whole = train(method, "--save", str(tmp_path / "whole"), *schedule)
    first = train(method, "--save", str(tmp_path / "half"), *schedule, "--exit-interval", "3")
    rest = train(method, "--save", str(tmp_path / "half"), *schedule)
    for name in ("loss", "ce", "distance"):
        halves = [step[name] for step in first[0] + rest[0]]
        assert halves == [step[name] for step in whole[0]], name
    assert first[1] + rest[1] == whole[1]


def test_what_is_refused(setup, train, tmp_path):
    def sentence(method, *flags) -> str:
        with pytest.raises(RankError) as caught:
            train(method, *flags)
        return str(caught.value)

    values, fused = (setup.soft_targets(m) for m in ("infifusion", "fusellm"))
    assert "was written with --fusion none" in sentence("fusellm", "--soft-targets", str(values))
    assert "with --fusion mince, expected none" in sentence(
        "infifusion", "--soft-targets", str(fused)
    )
    two = write_soft_targets(
        setup.data, tmp_path / "two", resolve("fusellm"), names=("qwen", "phi", "initial")
    )
    assert "has targets of qwen, phi" in sentence("fusechat", "--soft-targets", str(two))
    assert "no effect with --method sft" in sentence("sft", "--soft-targets", str(fused))
    assert "--lm-weight has no effect" in sentence("infifusion", "--lm-weight", "0.5")
    assert "--lm-weight is 1.5, expected a number in [0, 1]" in sentence(
        "fusellm", "--lm-weight", "1.5"
    )
    assert "--tail has no effect with --lm-weight 1" in sentence(
        "fusellm", "--lm-weight", "1", "--tail", "ghost"
    )
    assert "--uld-temperature has no effect with --uld-weight 0" in sentence(
        "infifusion", "--uld-weight", "0", "--uld-temperature", "2"
    )
    assert "was written with --ambiguous digits, which moves mass" in sentence(
        "fusellm", "--tail", "renormalised"
    )
    valid = ["--preference-valid-data", str(setup.data), "--valid-soft-targets", str(two)]
    assert "is of the sources qwen, phi, initial; expected" in sentence("fusellm", *valid)
    other = tmp_path / "other"
    for path in fused.parent.glob(f"{fused.name}[._]*"):
        shutil.copy(path, f"{other}{path.name.removeprefix(fused.name)}")
    manifest = json.loads(open(f"{other}.json").read())
    manifest["tokens_sha256"] = "0" * 64
    with open(f"{other}.json", "w") as file:
        json.dump(manifest, file)
    assert "fingerprint of the tokens is 000000000000" in sentence(
        "fusellm", "--soft-targets", str(other)
    )
    save = ["--save", str(tmp_path / "run"), "--save-interval", "3"]
    train("fusellm", *save)
    changed = write_soft_targets(
        setup.data, tmp_path / "changed", METHODS["fusellm"], groups=[np.array([1, 2])]
    )
    argv = [*save, "--soft-targets", str(changed), "--train-iters", "6"]
    assert "data.soft_targets.targets_sha256 is" in sentence("fusellm", *argv)


def test_held_out_targets(setup, train):
    """Held-out tokens count by cross-entropy alone unless they have targets of their own."""
    valid = ["--preference-valid-data", str(setup.data), "--train-iters", "1"]
    alone = train("fusellm", *valid)[2][0]
    plain = train("sft", *valid)[2][0]
    # After a step that both make in another direction.
    assert alone["loss"] == pytest.approx(plain["loss"], rel=1e-2) and "ce" not in alone
    targets = str(setup.soft_targets("fusellm"))
    taught = train("fusellm", *valid, "--valid-soft-targets", targets)[2][0]
    assert taught["ce"] == pytest.approx(alone["loss"], abs=1e-6)
    assert taught["distance"] > 0 and taught["loss"] != taught["ce"]


def test_a_pivot_learns_nothing_from_itself(setup, ranks, train, tmp_path):
    """Its own most probable ids as its only source, through all commands: the KL has no gradient.

    With a lm weight of a half the gradient is then a half of SFT's. Scaled up to 1, as published,
    the same ids pull.
    """
    inputs = ["--input", str(setup.records), "--output", str(tmp_path / "own"), "--top-k", "8"]
    ranks(
        1, "support.scoring:score", ["--backend", "megatron", "--model", str(setup.pivot), *inputs]
    )
    sources = tmp_path / "sources.yaml"
    sources.write_text("initial: own\nsources: [{name: own, logprobs: own}]\n")
    fused = ["--data", str(setup.data), "--sources", str(sources)]
    fused += ["--output", str(tmp_path / "t")]
    ranks(1, "support.tools:run_command", "fuse-targets", *fused)
    whole = ["--global-batch-size", "20", "--micro-batch-size", "20", "--train-iters", "1"]
    _, (expected,), _ = train("sft", *whole)
    learn = [*whole, "--soft-targets", str(tmp_path / "t"), "--lm-weight", "0.5"]
    (step,), (norm,), _ = train("fusellm", *learn)
    assert step["taught"] == 1 and step["distance"] < 1e-5
    assert norm == pytest.approx(expected / 2, rel=1e-4)
    fused = [*fused[:-1], str(tmp_path / "ids"), "--ambiguous", "id"]
    ranks(1, "support.tools:run_command", "fuse-targets", *fused)
    learn = [*whole, "--soft-targets", str(tmp_path / "ids"), "--lm-weight", "0.5"]
    (pulled,), (more,), _ = train("fusellm", *learn, "--tail", "renormalised")
    assert pulled["distance"] > 0.01 and more != pytest.approx(expected / 2, rel=1e-3)
