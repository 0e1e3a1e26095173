"""Megatron's flags of optimizers, schedules, checkpoints and ends of runs, in real runs."""

import json
import math

import pytest
import torch

from support.launcher import RankError
from support.runs import BOTH, flags, losses


def test_sgd(setup, ranks):
    """Steps are the learning rate times the clipped gradient, and half of the step before."""
    argv = flags(
        setup, "--optimizer", "sgd", "--sgd-momentum", "0.5", "--weight-decay", "0",
        "--clip-grad", "0.5", without=("--use-distributed-optimizer",),
    )  # fmt: skip
    result = ranks(1, "support.observed:observe", argv)[0]
    lr, clipped = 1e-3, 0.5
    assert result["moved"][0] == pytest.approx(lr * clipped, rel=1e-3)
    longest = lr * clipped * 1.5
    assert lr * clipped * 0.5 < result["moved"][1] <= longest and result["moved"][1] < longest


def test_adam(setup, ranks):
    """With an epsilon far above the gradient, and no momentum, a step is the clipped gradient."""
    argv = flags(
        setup, "--adam-beta1", "0", "--adam-beta2", "0.5", "--adam-eps", "1e6", "--lr", "1e6",
        "--clip-grad", "0.25", "--weight-decay", "0",
    )  # fmt: skip
    result = ranks(1, "support.observed:observe", argv)[0]
    assert result["moved"] == pytest.approx([0.25] * 3, rel=1e-3)
    assert {tuple(group["betas"]) for group in result["groups"][0]} == {(0.0, 0.5)}


def rates(result: dict, group: int = 0) -> list[float]:
    return [groups[group]["lr"] for groups in result["groups"]]


def test_schedule_in_steps(setup, ranks):
    """Cosine after a warm-up, embedding and output on rates of their own, rising weight decay."""
    argv = flags(
        setup, "--train-iters", "4", "--lr-decay-style", "cosine", "--lr-decay-iters", "4",
        "--lr-warmup-iters", "1", "--lr-warmup-init", "1e-5", "--min-lr", "1e-4",
        "--decoupled-lr", "1e-2", "--decoupled-min-lr", "1e-3",
        "--weight-decay-incr-style", "linear", "--start-weight-decay", "0.1",
        "--end-weight-decay", "0.5",
    )  # fmt: skip
    result = ranks(1, "support.observed:observe", argv)[0]
    share = [0.5 * (math.cos(math.pi * step / 3) + 1) for step in range(3)]  # of what decays
    found = {tuple(rates(result, group)) for group in range(len(result["groups"][0]))}
    expected = [
        [1e-5] + [low + part * (high - low) for part in share]
        for low, high in ((1e-4, 1e-3), (1e-3, 1e-2))
    ]
    assert sorted(found, key=lambda rate: rate[1]) == [pytest.approx(each) for each in expected]
    decays = [max(g["weight_decay"] for g in groups) for groups in result["groups"]]
    assert decays == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_schedule_warms_up_holds_and_decays(setup, ranks):
    argv = flags(
        setup, "--train-iters", "4", "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "linear",
        "--lr-wsd-decay-iters", "2", "--lr-warmup-fraction", "0.25",
    )  # fmt: skip
    assert rates(ranks(1, "support.observed:observe", argv)[0]) == pytest.approx(
        [1e-3, 1e-3, 1e-3, 5e-4]
    )


def test_schedule_in_pairs(setup, ranks):
    argv = flags(
        setup, "--train-samples", "32", "--lr-decay-samples", "32", "--lr-warmup-samples", "8",
        "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt",
        "--lr-wsd-decay-samples", "16", without=("--train-iters",),
    )  # fmt: skip
    result = ranks(1, "support.observed:observe", argv)[0]
    expected = [1e-3, 1e-3, 1e-3, 1e-3 * (1 - math.sqrt(0.5))]
    assert rates(result) == pytest.approx(expected)


def test_weight_decay_of_norms_of_heads(setup, ranks, tmp_path):
    """Their weights join the matrices, of which alone the weight decays by default."""
    from support import tiny

    hf = tiny.save_model(tmp_path / "hf", "qwen3", seed=4)
    argv = ["import", "--hf", str(hf), "--save", str(tmp_path / "pivot")]
    ranks(1, "support.tools:run_tool", "convert_checkpoint", argv)
    decayed = []
    for more in ([], ["--apply-wd-to-qk-layernorm"]):
        argv = flags(
            setup, "--method", "sft", "--pretrained-checkpoint", str(tmp_path / "pivot"),
            "--train-iters", "1", *more, without=("--preference-sources",),
        )  # fmt: skip
        groups = ranks(1, "support.observed:observe", argv)[0]["groups"][0]
        decayed.append(sum(g["params"] for g in groups if g["wd_mult"] > 0))
    assert decayed[1] - decayed[0] == 4 * 2 * 24  # layers, query and key, head size


def test_checkpoints(setup, ranks, tmp_path):
    """What is saved, kept and loaded, and whose schedule a resumed run follows."""
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1", "--lr-decay-style", "linear"]
    more = ["--lr-decay-iters", "4", "--save-retain-interval", "2", "--dist-ckpt-workers", "2"]
    more += ["--ckpt-assume-constant-structure", "--dist-ckpt-optim-fully-reshardable"]
    more += ["--distrib-optim-fully-reshardable-mem-efficient", "--no-save-rng"]
    more += ["--save-params-interval", "3", "--save-wgrads-interval", "3"]
    first = ranks(2, "support.observed:observe", flags(setup, *save, *more))[0]
    assert rates(first) == pytest.approx([1e-3, 0.75e-3, 0.5e-3])
    kept = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert kept == ["iter_0000002", "iter_0000003"]
    for what in ("params", "wgrads"):
        (path,) = (tmp_path / "run" / what / "iter_0000003").iterdir()
        tensors = torch.load(path, weights_only=True)["model_chunk0"]
        assert tensors["embedding.word_embeddings.weight"].shape == (384, 64), what
    save += ["--no-load-rng", "--lr-decay-iters", "8"]
    new = ["--override-opt_param-scheduler"]
    for more, rate in (
        (["--train-iters", "4", "--use-checkpoint-opt_param-scheduler"], 0.25e-3),
        (["--train-iters", "5", *new], 0.5e-3),
        # Without the optimizer's state the schedule goes on all the same.
        (["--train-iters", "6", *new, "--no-load-optim", "--no-save-optim"], 0.375e-3),
    ):
        again = ranks(2, "support.observed:observe", flags(setup, *save, *more))[0]
        assert rates(again) == pytest.approx([rate]), more
        assert again["steps"][0]["loss"] < first["steps"][-1]["loss"]


def test_saving_while_training_goes_on(setup, ranks, tmp_path):
    """Other processes write the checkpoints, which are those of a run that waits for them."""
    later, now = tmp_path / "later", tmp_path / "now"
    argv = flags(
        setup, "--save", str(later), "--save-interval", "2", "--async-save",
        "--use-persistent-ckpt-worker", "--async-strategy", "mcore", "--async-ckpt-cpu-priority",
        "5", "--async-ckpt-io-priority", "3", "--no-ckpt-fully-parallel-save",
    )  # fmt: skip
    ranks(2, "support.observed:observe", argv)
    assert "scheduled an async checkpoint save at iteration       3" in ranks.logs[0]
    ranks(2, "support.training:train", flags(setup, "--save", str(now), "--save-interval", "3"))
    sums = [json.loads((run / "iter_0000003/checksums.json").read_text()) for run in (later, now)]
    assert sums[0]["files"].keys() == sums[1]["files"].keys() > {"__0_0.distcp", "__1_0.distcp"}
    a, b = ranks(1, "support.observed:fingerprints", str(later), str(now))[0]
    assert a == b


def test_ends_before_the_last_step(setup, ranks, tmp_path):
    """At a signal to one rank all save and leave; from these weights, step 0 of another run.

    That one has no time for more than a step.
    """
    argv = flags(
        setup, "--save", str(tmp_path / "run"), "--save-interval", "100", "--exit-signal-handler",
        "--exit-signal", "SIGUSR1", "--ckpt-format", "torch_dist",
    )  # fmt: skip
    results = ranks(2, "support.observed:observe", argv, "signal")
    assert [len(result["steps"]) for result in results] == [1, 1]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "1"
    argv = flags(
        setup, "--load", str(tmp_path / "run"), "--finetune", "--reference-check", "off",
        "--exit-duration-in-mins", "30",
    )  # fmt: skip
    again = ranks(1, "support.observed:observe", argv, "late")
    assert len(again[0]["steps"]) == 1 and "iteration        1/       3" in ranks.logs[0]
    assert losses(again)[0] != pytest.approx(losses(results)[0], abs=1e-3)


def test_evaluation_alone(setup, ranks):
    sources = str(setup.sources("both", *BOTH))
    valid = ["--preference-valid-data", str(setup.data), "--preference-valid-sources", sources]
    still = ranks(
        1, "support.observed:observe", flags(setup, *valid, "--lr", "0", "--train-iters", "1")
    )
    alone = ranks(1, "support.observed:observe", flags(setup, *valid, "--skip-train"))
    assert not alone[0]["steps"]
    assert alone[0]["evaluations"][0] == pytest.approx(still[0]["evaluations"][0])


@pytest.mark.parametrize(
    "refused, why",
    [
        (["--tp-comm-overlap"], "its buffers have one size, and rows have lengths of their own"),
        (["--yaml-cfg", "nowhere.yaml"], "Megatron would ignore the command line"),
    ],
)
def test_refused_before_anything_starts(setup, ranks, tmp_path, refused, why):
    argv = flags(setup, *refused, "--save", str(tmp_path / "run"), "--save-interval", "1")
    with pytest.raises(RankError) as caught:
        ranks(1, "support.tools:command", "megatron_infifpo.train", argv)
    assert caught.value.codes == [2]
    assert f"error: {refused[0]} is not supported: {why}; leave it out" in caught.value.logs[0]
    assert not (tmp_path / "run").exists()
