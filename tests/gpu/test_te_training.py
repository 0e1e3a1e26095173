"""Training on Transformer Engine's layers, optimizer and fused gradients; runs that change layers.

Its Python is real, its kernels are emulated: see te_emulation.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_infifpo.patches.host_optimizer import alone
from megatron_infifpo.planning.estimate import LINK_BYTES
from megatron_infifpo.planning.precision import PRECISIONS
from support import te_training as te_jobs
from support.launcher import RankError

KINDS = ("local", "te", "te-attention")
LAYERS, STEPS, ROWS = 4, 4, 4  # rows a step
HALF = ["--exit-interval", "2"]
PARTS = ["--use-distributed-optimizer"]  # each rank saves its parts of flat buffers
WHOLE = [*PARTS, "--dist-ckpt-optim-fully-reshardable"]


@pytest.fixture(scope="module")
def job(newest_te_ranks, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("te-job"))
    newest_te_ranks(1, "support.te_training:make_job", folder, "qwen3")  # with norms of heads
    return folder


def run(ranks, job: str, kind: str | None, *more: str, old: bool = False) -> dict:
    argv = te_jobs.flags(job, "--train-iters", str(STEPS), *more)
    (record,) = ranks(1, "support.te_training:train", argv, kind, old)
    return record


def losses(record: dict) -> list[float]:
    return [step["loss"] for step in record["steps"]]


@pytest.fixture(scope="module")
def straight(newest_te_ranks, job) -> dict[str, dict]:
    """Four steps in float32 without a stop, by kind of layers."""
    return {kind: run(newest_te_ranks, job, kind) for kind in KINDS}


def test_kinds_train_alike(straight):
    expected = straight["local"]
    assert losses(expected)[-1] < losses(expected)[0]
    for kind in ("te", "te-attention"):
        assert losses(straight[kind]) == pytest.approx(losses(expected), abs=1e-4), kind
        assert straight[kind]["norms"] == pytest.approx(expected["norms"], rel=1e-4), kind


def test_gradients_are_added_in_the_product(straight):
    """Without Apex: Transformer Engine needs none, and Megatron's output layer is not called."""
    assert "gemm into a buffer" not in straight["local"]["calls"]
    for kind in ("te", "te-attention"):
        assert straight[kind]["calls"]["gemm into a buffer"] == 4 * LAYERS * STEPS * ROWS


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (["--bf16"], "te"),
        (["--bf16", "--te-attention"], "te-attention"),
        (["--bf16", "--transformer-impl", "local"], "local"),
        ([], "local"),
    ],
)
def test_choice_of_layers(newest_te_ranks, job, straight, flags, kind):
    """What a user's flags choose, and bfloat16 stays close to float32."""
    record = run(newest_te_ranks, job, None, *flags, *HALF)
    assert record["kind"] == kind
    assert losses(record) == pytest.approx(losses(straight["local"])[:2], rel=0.1)


@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recomputation(newest_te_ranks, job, straight, granularity):
    """Layers, or attention alone, run again in the backward pass, with the same row."""
    flags = ["--recompute-granularity", granularity]
    if granularity == "full":
        flags += ["--recompute-method", "uniform", "--recompute-num-layers", "1"]
    record = run(newest_te_ranks, job, "te", *flags, *HALF)
    assert losses(record) == pytest.approx(losses(straight["local"])[:2], abs=1e-4)


@pytest.mark.parametrize("kind", ["te", "te-attention"])
def test_context_parallel(newest_te_ranks, job, straight, kind):
    """Ranks share a row through our attention; Transformer Engine's own is refused."""
    argv = te_jobs.flags(job, "--train-iters", str(STEPS), "--context-parallel-size", "2", *HALF)
    if kind == "te-attention":
        with pytest.raises(RankError):
            newest_te_ranks(2, "support.te_training:train", argv, kind)
        said = "--context-parallel-size does not work with Transformer Engine's attention"
        assert said in "\n".join(newest_te_ranks.logs)  # whichever rank is first
        return
    for record in newest_te_ranks(2, "support.te_training:train", argv, kind):
        assert losses(record) == pytest.approx(losses(straight["local"])[:2], abs=1e-4)
        norms = pytest.approx(straight["local"]["norms"][:2], rel=1e-4)
        assert record["norms"] == norms


def test_scoring(newest_te_ranks, job):
    """The scorer's backend, too; in bfloat16 it takes Transformer Engine's layers by itself."""
    scores = {}
    for kind in (*KINDS, None):
        ((name, scores[kind]),) = newest_te_ranks(
            1, "support.te_layers:score", f"{job}/pivot", kind
        )
        assert name == (kind or "te")
    for kind in ("te", "te-attention"):
        assert (scores[kind] - scores["local"]).abs().max() < 1e-4, kind
    assert (scores[None] - scores["local"]).abs().mean() < 0.1


def saving(tmp_path: Path) -> list[str]:
    return ["--save", str(tmp_path / "run"), "--save-interval", "2"]


def assert_goes_on(resumed: dict, straight: dict) -> None:
    assert losses(resumed) == pytest.approx(losses(straight["local"])[2:], abs=1e-4)
    assert resumed["norms"] == pytest.approx(straight["local"]["norms"][2:], rel=1e-4)


@pytest.mark.parametrize(
    ("first", "second", "optimizer"),
    [
        ("local", "te", []),
        ("te", "local", []),
        ("local", "te", WHOLE),
        ("te", "local", WHOLE),
        ("te", "te-attention", PARTS),  # the same modules in the same order
    ],
)
def test_resuming_on_other_layers(
    newest_te_ranks, job, straight, tmp_path, first, second, optimizer
):
    """Weights and Transformer Engine's Adam go on where they stopped."""
    more = [*saving(tmp_path), *optimizer]
    run(newest_te_ranks, job, first, *more, *HALF)
    assert_goes_on(run(newest_te_ranks, job, second, *more), straight)


def test_parts_of_buffers_do_not_fit_other_layers(newest_te_ranks, job, tmp_path):
    """Each kind orders parameters in its own way, and parts of buffers have no names."""
    more = [*saving(tmp_path), *PARTS]
    run(newest_te_ranks, job, "local", *more, *HALF)
    with pytest.raises(RankError, match="transformer impl was local and is transformer_engine"):
        run(newest_te_ranks, job, "te", *more)


@pytest.mark.parametrize("kind", ["local", "te"])
def test_resuming_an_old_run(newest_te_ranks, job, straight, tmp_path, kind):
    """Local layers once saved no extra state of the norms that Transformer Engine has one for."""
    more = saving(tmp_path)
    run(newest_te_ranks, job, "local", *more, *HALF, old=True)
    assert_goes_on(run(newest_te_ranks, job, kind, *more), straight)


@pytest.mark.parametrize("state", [PARTS, WHOLE], ids=["parts", "whole"])
@pytest.mark.parametrize("fused_first", [False, True], ids=["to fused", "to PyTorch's"])
def test_resuming_with_another_adam(
    newest_te_ranks, ranks, job, straight, tmp_path, fused_first, state
):
    """A cluster may have Transformer Engine where the one before had none, or lose it."""
    more = [*saving(tmp_path), *state]
    without = te_jobs.flags(job, *more, "--train-iters", str(STEPS))
    if fused_first:
        run(newest_te_ranks, job, "local", *more, *HALF)
        (resumed,) = ranks(1, "support.training:train", without)
    else:
        ranks(1, "support.training:train", [*without, *HALF])
        resumed = run(newest_te_ranks, job, "local", *more)
    assert_goes_on(resumed, straight)


BF16 = ["--bf16", *PARTS]
# Main parameters are what bfloat16 lacks of float32, 16 bits.
BITS = [*BF16, "--use-precision-aware-optimizer"]
HOST = [
    *BITS, "--optimizer-cpu-offload", "--optimizer-offload-fraction", "0.5",
    "--overlap-cpu-optimizer-d2h-h2d", "--no-pin-cpu-grads",
]  # fmt: skip
OPTIMIZERS = {"plain": BF16, "bits": BITS, "host": HOST}
# A count of steps that stands still after a resume shows in the third loss.
SIX = ["--train-iters", "6"]


@pytest.fixture(scope="module")
def six(newest_te_ranks, job) -> dict[str, dict]:
    """Six steps in bfloat16 without a stop, by optimizer."""
    return {
        name: run(newest_te_ranks, job, "te", *flags, *SIX) for name, flags in OPTIMIZERS.items()
    }


def assert_same_end(record: dict, expected: dict, rel: float) -> None:
    count = len(record["steps"])
    assert losses(record) == pytest.approx(losses(expected)[-count:], rel=rel)
    assert record["norms"] == pytest.approx(expected["norms"][-count:], rel=rel)


def test_optimizers_train_alike(six):
    """Roundings of bfloat16 parameters differ, at most; half of the state is on either side."""
    for name in ("bits", "host"):
        assert_same_end(six[name], six["plain"], 0.01)
    assert not six["plain"]["host"]
    for number, step in enumerate(six["host"]["host"], start=1):
        assert step["host"] == pytest.approx(step["device"], rel=0.1)
        assert step["host steps"] == step["device steps"] == {number}


LIGHTER: dict[str, dict[str, Any]] = {
    "plain": {},
    "bits": {"aware": True},
    "host": {"offload": 0.5},
}


@pytest.mark.parametrize("name", LIGHTER)
def test_planned_state(six, name):
    """What the optimizer holds, on either side, is what the planner counts."""
    found, planned = six[name]["held"], PRECISIONS["bf16"].lighter(**LIGHTER[name])
    for place, size in (("device", planned.optimizer), ("host", planned.host)):
        # Whole parameters go to the host, and few are here.
        assert found[place] == pytest.approx(size * found["parameters"], rel=0.15), place
    moved = LINK_BYTES * planned.offloaded * found["parameters"]
    assert found["moved"] == pytest.approx(moved, rel=0.15)


@pytest.mark.parametrize("state", [PARTS, WHOLE], ids=["parts", "whole"])
@pytest.mark.parametrize(("name", "stops"), [("bits", "2"), ("host", "24")])
def test_resuming_as_it_was(newest_te_ranks, job, six, tmp_path, name, stops, state):
    """Moments, counts of steps and all bits of parameters are what they were."""
    more = [*OPTIMIZERS[name], *saving(tmp_path), *state, *SIX]
    for stop in stops:
        run(newest_te_ranks, job, "te", *more, "--exit-interval", stop)
    record = run(newest_te_ranks, job, "te", *more)
    assert len(record["steps"]) == 6 - int(stops[-1])
    assert_same_end(record, six[name], 1e-6)
    if name == "host":
        assert record["host"][-1] == six["host"]["host"][-1]


@pytest.mark.parametrize(
    ("first", "second", "state"),
    [("plain", "host", PARTS), ("host", "plain", WHOLE)],
    ids=["to the host", "from the host"],
)
def test_moving_to_the_host_and_back(newest_te_ranks, job, six, tmp_path, first, second, state):
    more = [*saving(tmp_path), *state, *SIX]
    run(newest_te_ranks, job, "te", *OPTIMIZERS[first], *more, *HALF)
    record = run(newest_te_ranks, job, "te", *OPTIMIZERS[second], *more)
    assert len(record["steps"]) == 4
    assert_same_end(record, six["plain"], 0.01)
    if second == "host":
        assert record["host"][-1] == six["host"]["host"][-1]


def test_bits_are_no_parameters(newest_te_ranks, job, tmp_path):
    """They would be taken for parameters, or these for them, and training go on with nonsense."""
    more = [*saving(tmp_path), *SIX]
    run(newest_te_ranks, job, "te", *OPTIMIZERS["bits"], *more, *HALF)
    said = "main parameters were the 16 bits that bfloat16 lacks and are whole"
    for name in ("plain", "host"):
        with pytest.raises(RankError, match=said):
            run(newest_te_ranks, job, "te", *OPTIMIZERS[name], *more)


def test_a_part_alone():
    """What is kept of a loaded buffer does not keep the buffer."""
    buffer = torch.arange(8.0)
    kept = alone(buffer[2:4])
    assert kept.tolist() == [2.0, 3.0] and kept.untyped_storage().nbytes() == kept.nbytes
    assert alone(buffer) is buffer and alone(3) == 3
