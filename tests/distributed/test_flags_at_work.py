"""Megatron's flags in real runs: what they promise is seen, and what must not change does not."""

import math

import pytest
import torch
from launcher import RankError
from test_training import BOTH, steps_of

FULL = ["--recompute-granularity", "full", "--recompute-num-layers", "1"]
PIPELINE = "--pipeline-model-parallel-size"


def flags(setup, *more: str, without: tuple[str, ...] = ()) -> list[str]:
    """Command line of three steps, less some flags."""
    argv = setup.flags(setup.sources("both", *BOTH), *more)
    for flag in without:
        at = argv.index(flag)
        del argv[at : at + (1 if flag == "--use-distributed-optimizer" else 2)]
    return argv


def losses(results: list[dict]) -> list[float]:
    return [step["loss"] for step in steps_of(results)]


@pytest.fixture(scope="module")
def plain(setup, ranks):
    """Two data-parallel ranks, without any of the flags."""
    return ranks(2, "flag_workers:observe", flags(setup))


@pytest.fixture
def unchanged(setup, ranks, plain):
    """Run with flags that must change neither losses nor gradients; return what was observed."""

    def run(world: int, *more: str) -> list[dict]:
        results = ranks(world, "flag_workers:observe", flags(setup, *more))
        assert losses(results) == pytest.approx(losses(plain), abs=1e-4)
        assert results[0]["norms"] == pytest.approx(plain[0]["norms"], rel=1e-4)
        return results

    return run


def test_care_of_a_run(unchanged, ranks, plain):
    """Checks, synchronisation, memory, buckets and recomputed parts leave the numbers alone."""
    results = unchanged(
        2, "--no-initialization", "--check-for-large-grads", "--train-sync-interval", "1",
        "--check-weight-hash-across-dp-replicas-interval", "1", "--empty-unused-memory-level", "2",
        "--manual-gc", "--manual-gc-interval", "1", "--no-manual-gc-eval", "--disable-jit-fuser",
        "--disable-gloo-process-groups", "--distributed-timeout-minutes", "5",
        "--distributed-timeout-seconds-after-init", "60", "--make-vocab-size-divisible-by", "64",
        "--rerun-mode", "disabled", "--no-one-logger", "--transformer-impl", "local",
        "--recompute-activations", "--recompute-modules", "core_attn", "mlp",
        "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-num-buckets", "3",
        "--ddp-pad-buckets-for-high-nccl-busbw", "--no-align-grad-reduce",
        "--ckpt-fully-parallel-load", "--no-ckpt-load-validate-sharding-integrity",
        "--dist-ckpt-strictness", "raise_unexpected", "--no-check-for-nan-in-loss-and-grad",
    )  # fmt: skip
    assert "Weight hashes match after 3 iterations" in ranks.logs[0]
    steps = 3 * 4 * 2  # steps, layers, micro-batches
    probed = plain[0]["attended"] - steps
    assert results[0]["attended"] == probed + 2 * steps, "attention was not computed again"


def test_logs(setup, ranks, plain, tmp_path):
    """What is logged where, and a profile of the second step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, save = tmp_path / "board", tmp_path / "run"
    argv = flags(
        setup, "--log-params-norm", "--log-num-zeros-in-grad", "--log-throughput", "--log-progress",
        "--timing-log-level", "2", "--timing-log-option", "all", "--log-timers-to-tensorboard",
        "--log-validation-ppl-to-tensorboard", "--log-memory-to-tensorboard",
        "--log-memory-interval", "2", "--log-world-size-to-tensorboard", "--logging-level", "20",
        "--no-log-loss-scale-to-tensorboard", "--no-barrier-with-level-1-timing",
        "--tensorboard-dir", str(board), "--tensorboard-queue-size", "5", "--local-rank", "0",
        "--save", str(save), "--save-interval", "3", "--wandb-project", "fusion",
        "--wandb-exp-name", "first", "--wandb-save-dir", str(tmp_path), "--wandb-entity", "us",
        "--profile", "--use-pytorch-profiler", "--profile-step-start", "1",
        "--profile-step-end", "2", "--profile-ranks", "0", "--pytorch-profiler-collect-shapes",
        "--pytorch-profiler-collect-callstack", "--pytorch-profiler-collect-chakra",
        "--preference-valid-data", str(setup.data), "--preference-valid-sources",
        str(setup.sources("both", *BOTH)), "--eval-interval", "1", "--start-eval-at-iter", "2",
    )  # fmt: skip
    results = ranks(1, "flag_workers:observe", argv)
    assert losses(results) == pytest.approx(losses(plain), abs=1e-4)
    assert len(results[0]["evaluations"]) == 3  # after steps 2 and 3, and at the end
    log = ranks.logs[0]
    for text in (
        "params norm: ",
        "num zeros: ",
        "throughput per GPU",
        "forward-compute",
        "rank  0",
    ):
        assert text in log, text
    assert "(after 2 iterations) memory" in log
    assert "Saved checkpoint" in (save / "progress.txt").read_text()
    events = EventAccumulator(str(board)).Reload()
    tags = set(events.Tags()["scalars"])
    expected = {"params-norm", "num-zeros", "throughput", "iteration-time", "mem-reserved-bytes"}
    assert expected | {"world-size", "loss validation ppl", "optimizer-time"} <= tags
    assert "loss-scale" not in tags
    started, logged = results[0]["wandb"]
    names = {"project": "fusion", "name": "first", "entity": "us", "dir": str(tmp_path)}
    assert names.items() <= started.items()
    assert {"loss", "grad-norm", "learning-rate"} <= logged
    assert list((tmp_path / "torch_profile").iterdir()) and list((tmp_path / "chakra").iterdir())


@pytest.mark.parametrize(
    "split",
    [
        ["--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"],
        ["--decoder-first-pipeline-num-layers", "1", "--decoder-last-pipeline-num-layers", "1"],
    ],
    ids=["accounted", "stated"],
)
def test_uneven_stages(unchanged, split):
    results = unchanged(3, PIPELINE, "3", *split, *FULL, "--recompute-method", "block")
    assert [result["layers"] for result in results] == [[1], [2], [1]]


def test_interleaved_by_layout(unchanged):
    results = unchanged(
        2, PIPELINE, "2", "--pipeline-model-parallel-layout", "E|t|tt|tL",
        "--microbatch-group-size-per-virtual-pipeline-stage", "4",
        "--overlap-p2p-communication-warmup-flush",
    )  # fmt: skip
    assert [result["layers"] for result in results] == [[0, 2], [1, 1]]


def test_interleaved_by_layers(unchanged):
    """Neighbouring ranks are stages of one pipeline, not data-parallel replicas."""
    results = unchanged(
        4, PIPELINE, "2", "--num-layers-per-virtual-pipeline-stage", "1", "--overlap-grad-reduce",
        "--overlap-param-gather", "--no-align-param-gather", "--use-tp-pp-dp-mapping",
    )  # fmt: skip
    assert [result["place"] for result in results] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [result["layers"] for result in results] == [[1, 1]] * 4


def test_interleaved_without_overlap(unchanged):
    layout = ["--pipeline-model-parallel-layout", "E|t|t|t||t||L"]
    results = unchanged(4, PIPELINE, "4", *layout, "--no-overlap-p2p-communication")
    assert [result["layers"] for result in results] == [[0, 0], [1, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize(
    "more",
    [
        [*FULL, "--recompute-method", "uniform", "--distribute-saved-activations"],
        ["--sequence-parallel", "--no-clone-scatter-output-in-embedding",
         "--mlp-chunks-for-training", "3"],
    ],
    ids=["saved in parts", "in chunks"],
)  # fmt: skip
def test_memory_with_tensor_parallelism(unchanged, more):
    unchanged(2, "--tensor-model-parallel-size", "2", *more)


def test_sgd(setup, ranks):
    """Steps are the learning rate times the clipped gradient, and half of the step before."""
    argv = flags(
        setup, "--optimizer", "sgd", "--sgd-momentum", "0.5", "--weight-decay", "0",
        "--clip-grad", "0.5", without=("--use-distributed-optimizer",),
    )  # fmt: skip
    result = ranks(1, "flag_workers:observe", argv)[0]
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
    result = ranks(1, "flag_workers:observe", argv)[0]
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
    result = ranks(1, "flag_workers:observe", argv)[0]
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
    assert rates(ranks(1, "flag_workers:observe", argv)[0]) == pytest.approx([0, 1e-3, 1e-3, 5e-4])


def test_schedule_in_pairs(setup, ranks):
    argv = flags(
        setup, "--train-samples", "32", "--lr-decay-samples", "32", "--lr-warmup-samples", "8",
        "--lr-decay-style", "WSD", "--lr-wsd-decay-style", "minus_sqrt",
        "--lr-wsd-decay-samples", "16", without=("--train-iters",),
    )  # fmt: skip
    result = ranks(1, "flag_workers:observe", argv)[0]
    expected = [0, 1e-3, 1e-3, 1e-3 * (1 - math.sqrt(0.5))]
    assert rates(result) == pytest.approx(expected)


def test_weight_decay_of_norms_of_heads(setup, ranks, tmp_path):
    """Their weights join the matrices, of which alone the weight decays by default."""
    import tiny

    hf = tiny.save_model(tmp_path / "hf", "qwen3", seed=4)
    argv = ["import", "--hf", str(hf), "--save", str(tmp_path / "pivot")]
    ranks(1, "workers:run_tool", "convert_checkpoint", argv)
    decayed = []
    for more in ([], ["--apply-wd-to-qk-layernorm"]):
        argv = flags(
            setup, "--method", "sft", "--pretrained-checkpoint", str(tmp_path / "pivot"),
            "--train-iters", "1", *more, without=("--preference-sources",),
        )  # fmt: skip
        groups = ranks(1, "flag_workers:observe", argv)[0]["groups"][0]
        decayed.append(sum(g["params"] for g in groups if g["wd_mult"] > 0))
    assert decayed[1] - decayed[0] == 4 * 2 * 24  # layers, query and key, head size


def test_fp16(setup, ranks, plain):
    """The scale of the loss doubles after every second good step; a stated one stays."""
    scaled = [
        "--fp16", "--initial-loss-scale", "1024", "--loss-scale-window", "2", "--hysteresis", "1",
        "--min-loss-scale", "2", "--accumulate-allreduce-grads-in-fp32",
    ]  # fmt: skip
    for more, scales in ((scaled, [1024, 2048, 2048]), (["--fp16", "--loss-scale", "8"], [8] * 3)):
        result = ranks(1, "flag_workers:observe", flags(setup, *more))
        assert result[0]["scales"] == scales
        assert losses(result) == pytest.approx(losses(plain), rel=0.01)


def test_reduction_in_bf16(setup, ranks, plain):
    """Gradients that only travel in bfloat16 differ from those that are summed in it."""
    half = ["--bf16", "--grad-reduce-in-bf16", "--micro-batch-size", "1"]
    summed = ["--ddp-reduce-scatter-with-fp32-accumulation"]
    summed += ["--ddp-param-name-patterns-for-fp32-local-accumulation", "all"]
    runs = [ranks(2, "flag_workers:observe", flags(setup, *half, *more)) for more in ([], summed)]
    for run in runs:
        assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    assert runs[0][0]["norms"] != runs[1][0]["norms"]


def test_checkpoints(setup, ranks, tmp_path):
    """What is saved, kept and loaded, and whose schedule a resumed run follows."""
    save = ["--save", str(tmp_path / "run"), "--save-interval", "1", "--lr-decay-style", "linear"]
    more = ["--lr-decay-iters", "4", "--save-retain-interval", "2", "--dist-ckpt-workers", "2"]
    more += ["--ckpt-assume-constant-structure", "--dist-ckpt-optim-fully-reshardable"]
    more += ["--distrib-optim-fully-reshardable-mem-efficient", "--no-save-rng"]
    more += ["--save-params-interval", "3", "--save-wgrads-interval", "3"]
    first = ranks(2, "flag_workers:observe", flags(setup, *save, *more))[0]
    assert rates(first) == pytest.approx([1e-3, 0.75e-3, 0.5e-3])
    kept = sorted(path.name for path in (tmp_path / "run").glob("iter_*"))
    assert kept == ["iter_0000002", "iter_0000003"]
    for what in ("params", "wgrads"):
        (path,) = (tmp_path / "run" / what / "iter_0000003").iterdir()
        tensors = torch.load(path, weights_only=True)["model_chunk0"]
        assert tensors["embedding.word_embeddings.weight"].shape == (384, 64), what
    save += ["--no-load-rng", "--lr-decay-iters", "8"]
    for more, rate in (
        (["--train-iters", "4", "--use-checkpoint-opt_param-scheduler"], 0.25e-3),
        (["--train-iters", "5", "--override-opt_param-scheduler"], 0.5e-3),
        # Without the optimizer's state the schedule begins anew.
        (["--train-iters", "6", "--no-load-optim", "--no-save-optim"], 1e-3),
    ):
        again = ranks(2, "flag_workers:observe", flags(setup, *save, *more))[0]
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
    ranks(2, "flag_workers:observe", argv)
    assert "scheduled an async checkpoint save at iteration       3" in ranks.logs[0]
    ranks(2, "workers:train", flags(setup, "--save", str(now), "--save-interval", "3"))
    a, b = ranks(1, "flag_workers:fingerprints", str(later), str(now))[0]
    assert a == b


def test_ends_before_the_last_step(setup, ranks, tmp_path):
    """At a signal to one rank all save and leave; from these weights, step 0 of another run.

    That one has no time for more than a step.
    """
    argv = flags(
        setup, "--save", str(tmp_path / "run"), "--save-interval", "100", "--exit-signal-handler",
        "--exit-signal", "SIGUSR1", "--ckpt-format", "torch_dist",
    )  # fmt: skip
    results = ranks(2, "flag_workers:observe", argv, "signal")
    assert [len(result["steps"]) for result in results] == [1, 1]
    assert (tmp_path / "run" / "latest_checkpointed_iteration.txt").read_text() == "1"
    argv = flags(
        setup, "--load", str(tmp_path / "run"), "--finetune", "--reference-check", "off",
        "--exit-duration-in-mins", "30",
    )  # fmt: skip
    again = ranks(1, "flag_workers:observe", argv, "late")
    assert len(again[0]["steps"]) == 1 and "iteration        1/       3" in ranks.logs[0]
    assert losses(again)[0] != pytest.approx(losses(results)[0], abs=1e-3)


def test_evaluation_alone(setup, ranks):
    sources = str(setup.sources("both", *BOTH))
    valid = ["--preference-valid-data", str(setup.data), "--preference-valid-sources", sources]
    still = ranks(
        1, "flag_workers:observe", flags(setup, *valid, "--lr", "0", "--train-iters", "1")
    )
    alone = ranks(1, "flag_workers:observe", flags(setup, *valid, "--skip-train"))
    assert not alone[0]["steps"]
    assert alone[0]["evaluations"][0] == pytest.approx(still[0]["evaluations"][0])


def test_refused_before_anything_starts(setup, ranks, tmp_path):
    argv = flags(
        setup, "--tp-comm-overlap", "--save", str(tmp_path / "run"), "--save-interval", "1"
    )
    with pytest.raises(RankError) as caught:
        ranks(1, "workers:command", "megatron_infifpo.train", argv)
    assert caught.value.codes == [2]
    assert "--tp-comm-overlap is not supported: its buffers have one size" in caught.value.logs[0]
    assert not (tmp_path / "run").exists()
