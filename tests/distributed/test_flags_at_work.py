"""Megatron's flags in real runs: what they promise is seen, and what must not change does not."""

import pytest

from support.runs import BOTH, flags, losses

FULL = ["--recompute-granularity", "full", "--recompute-num-layers", "1"]
PIPELINE = "--pipeline-model-parallel-size"


@pytest.fixture(scope="module")
def plain(setup, ranks):
    """Two data-parallel ranks, without any of the flags."""
    return ranks(2, "support.observed:observe", flags(setup))


@pytest.fixture
def unchanged(setup, ranks, plain):
    """Run with flags that must change neither losses nor gradients; return what was observed."""

    def run(world: int, *more: str) -> list[dict]:
        results = ranks(world, "support.observed:observe", flags(setup, *more))
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
    results = ranks(1, "support.observed:observe", argv)
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


def test_fp16(setup, ranks, plain):
    """The scale of the loss doubles after every second good step; a stated one stays."""
    scaled = [
        "--fp16", "--initial-loss-scale", "1024", "--loss-scale-window", "2", "--hysteresis", "1",
        "--min-loss-scale", "2", "--accumulate-allreduce-grads-in-fp32",
    ]  # fmt: skip
    for more, scales in ((scaled, [1024, 2048, 2048]), (["--fp16", "--loss-scale", "8"], [8] * 3)):
        result = ranks(1, "support.observed:observe", flags(setup, *more))
        assert result[0]["scales"] == scales
        assert losses(result) == pytest.approx(losses(plain), rel=0.01)


def test_reduction_in_bf16(setup, ranks, plain):
    """Gradients that only travel in bfloat16 differ from those that are summed in it."""
    half = ["--bf16", "--grad-reduce-in-bf16", "--micro-batch-size", "1"]
    summed = ["--ddp-reduce-scatter-with-fp32-accumulation"]
    summed += ["--ddp-param-name-patterns-for-fp32-local-accumulation", "all"]
    runs = [
        ranks(2, "support.observed:observe", flags(setup, *half, *more)) for more in ([], summed)
    ]
    for run in runs:
        assert losses(run) == pytest.approx(losses(plain), rel=0.05)
    assert runs[0][0]["norms"] != runs[1][0]["norms"]
