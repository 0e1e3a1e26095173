"""Adapters on Transformer Engine's layers, where the norm before a product is a part of its module.

Its Python is real, its kernels are emulated: see te_emulation.py.
"""

import pytest

from support import te_training as te_jobs

LORA = ["--lora-rank", "4", "--lora-alpha", "12", "--lr", "1e-2"]
STEPS = 3


@pytest.fixture(scope="module")
def job(newest_te_ranks, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("te-lora"))
    newest_te_ranks(1, "support.te_training:make_job", folder, "qwen2")  # with biases
    return folder


def train(ranks, world: int, job: str, kind: str, *more: str) -> list[dict]:
    argv = te_jobs.flags(job, "--train-iters", str(STEPS), *LORA, *more)
    return ranks(world, "support.te_training:train", argv, kind)


def losses(found: list[dict]) -> list[float]:
    return [step["loss"] for step in found[-1]["steps"]]


@pytest.fixture(scope="module")
def local(newest_te_ranks, job) -> dict:
    """On local layers."""
    (record,) = train(newest_te_ranks, 1, job, "local")
    return record


@pytest.mark.parametrize("kind", ["te", "te-attention"])
def test_kinds_train_alike(te_ranks, job, local, kind):
    """And no gradient of a frozen weight is computed, nor added to a buffer that is not there."""
    (record,) = train(te_ranks, 1, job, kind)
    assert record["kind"] == kind
    assert losses([record]) == pytest.approx(losses([local]), abs=1e-4)
    assert record["norms"] == pytest.approx(local["norms"], rel=1e-4)
    assert "gemm into a buffer" not in record["calls"]


@pytest.mark.parametrize("more", [[], ["--sequence-parallel"]], ids=["tp2", "tp2-sp"])
def test_tensor_parallel(newest_te_ranks, job, local, more):
    found = train(newest_te_ranks, 2, job, "te", "--tensor-model-parallel-size", "2", *more)
    assert losses(found) == pytest.approx(losses([local]), abs=1e-4)
    assert found[0]["norms"] == pytest.approx(local["norms"], rel=1e-4)


def test_recomputed_and_resumed_on_other_layers(newest_te_ranks, job, local, tmp_path):
    """A checkpoint of adapters goes from Transformer Engine's layers to local ones."""
    save = ["--save", str(tmp_path / "run"), "--use-distributed-optimizer"]
    save += ["--dist-ckpt-optim-fully-reshardable"]
    full = ["--recompute-granularity", "full", "--recompute-method", "uniform"]
    full += ["--recompute-num-layers", "1"]
    first = train(newest_te_ranks, 1, job, "te", *save, *full, "--stop-at", "2")
    assert losses(first) == pytest.approx(losses([local])[:2], abs=1e-4)
    rest = train(newest_te_ranks, 1, job, "local", *save, "--transformer-impl", "local")
    assert losses(rest) == pytest.approx(losses([local])[2:], abs=1e-4)
