"""Resuming: bit for bit where the optimizer state fits, a sentence where it does not."""

import shutil

import pytest

from megatron_infifpo.training.resharding import bucket_size, differences
from support.launcher import RankError
from support.runs import BOTH, LAYOUTS, steps_of

SCHEDULE = ["--save-interval", "3", "--train-iters", "6"]
BY_NAME = ["--dist-ckpt-optim-fully-reshardable"]
SPARING = [*BY_NAME, "--distrib-optim-fully-reshardable-mem-efficient"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
# How the first half is saved, on two data-parallel ranks: name -> flags
HALVES = {
    "default": [],
    "by-name": BY_NAME,
    "sparing": SPARING,
    "buckets": [*OVERLAP, "--ddp-bucket-size", "5000"],
    "bf16": ["--bf16"],
}


@pytest.fixture(scope="module")
def train(setup, ranks):
    """Run six steps, or what is left of them, into a folder; return steps and gradient norms."""
    sources = setup.sources("both", *BOTH)

    def run(folder, world, *flags):
        argv = setup.flags(sources, "--save", str(folder), *SCHEDULE, *flags)
        results = ranks(world, "support.training:train", argv)
        losses = [step["loss"] for step in steps_of(results)]
        return losses, results[0]["norms"]

    return run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The undisturbed run, by its flags; in float32 nothing depends on how state is saved."""
    found = {}

    def run(*flags):
        if flags not in found:
            found[flags] = train(tmp_path_factory.mktemp("whole") / "run", 2, *flags)
        return found[flags]

    return run


@pytest.fixture(scope="module")
def half(train, tmp_path_factory):
    """Copies of a run that ended after three steps, by the name of `HALVES`."""
    folder = tmp_path_factory.mktemp("halves")

    def copy(name, where):
        if not (folder / name).exists():
            train(folder / name, 2, *HALVES[name], "--exit-interval", "3")
        return shutil.copytree(folder / name, where)

    return copy


def last_three(result):
    losses, norms = result
    return losses[3:], norms[3:]


@pytest.mark.parametrize("name", HALVES)
def test_same_layout(train, whole, half, tmp_path, name):
    run = half(name, tmp_path / "run")
    own = HALVES[name] if name in ("buckets", "bf16") else []
    assert train(run, 2, *HALVES[name]) == last_three(whole(*own))


@pytest.mark.parametrize("world", [1, 4])
def test_another_data_parallel_size(train, whole, half, tmp_path, world):
    """State that each rank saved for itself ends up where state saved by name does."""
    by_rank = train(half("default", tmp_path / "a"), world)
    by_name = train(half("by-name", tmp_path / "b"), world, *BY_NAME)
    assert by_rank == by_name
    for found, expected in zip(by_rank, last_three(whole()), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("world", [1, 4])
def test_buckets_at_another_data_parallel_size(train, whole, half, tmp_path, world):
    found = train(half("buckets", tmp_path / "run"), world, *HALVES["buckets"])
    for values, expected in zip(found, last_three(whole(*HALVES["buckets"])), strict=True):
        assert values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["by-name", "sparing"])
@pytest.mark.parametrize("layout", ["tp2", "pp2", "pp2-vpp2"])
def test_by_name_fits_every_layout(train, whole, half, tmp_path, name, layout):
    """The flag is of the save: what is saved next is by rank again."""
    world, flags = LAYOUTS[layout]
    found = train(half(name, tmp_path / "run"), world, *flags)
    for values, expected in zip(found, last_three(whole()), strict=True):
        assert values == pytest.approx(expected, rel=1e-4)


REFUSED = {
    "tp2": (LAYOUTS["tp2"][1], "tensor model parallel size was 1 and is 2"),
    "pp2": (LAYOUTS["pp2"][1], "pipeline model parallel size was 1 and is 2"),
    "vpp2": (LAYOUTS["pp2-vpp2"][1], "virtual pipeline model parallel size was None and is 2"),
    "bf16": (["--bf16"], "bf16 was False and is True"),
    "buckets": (HALVES["buckets"], "in buckets of all parameters, and are in ones of 5000"),
}


@pytest.mark.parametrize("change", REFUSED)
def test_by_rank_does_not(setup, ranks, half, tmp_path, change):
    flags, expected = REFUSED[change]
    run = half("default", tmp_path / "run")
    before = sorted(run.rglob("*"))
    argv = setup.flags(setup.sources("both", *BOTH), "--save", str(run), *SCHEDULE, *flags)
    with pytest.raises(RankError) as failure:
        ranks(2, "support.tools:command", "megatron_infifpo.train", argv)
    assert 2 in failure.value.codes, failure.value  # the first to end; others may be killed
    said = "".join(failure.value.logs)
    assert "Traceback" not in said
    for advice in (expected, "--dist-ckpt-optim-fully-reshardable", "--no-load-optim"):
        assert advice in said
    assert sorted(run.rglob("*")) == before


def test_the_advice_helps(train, whole, half, tmp_path):
    """Resumed once as it was, with the flag; then at another layout. Or with a fresh optimizer."""
    run = half("default", tmp_path / "run")
    first = train(run, 2, *BY_NAME, "--exit-interval", "4", "--save-interval", "4")
    second = train(run, *LAYOUTS["tp2"][:1], *LAYOUTS["tp2"][1])
    for a, b, expected in zip(first, second, last_three(whole()), strict=True):
        assert a + b == pytest.approx(expected, rel=1e-4)
    fresh, _ = train(half("default", tmp_path / "fresh"), 2, *LAYOUTS["tp2"][1], "--no-load-optim")
    assert fresh[0] == pytest.approx(whole()[0][3], rel=1e-4)
    assert fresh[1] != pytest.approx(whole()[0][4], rel=1e-2), "Adam has no memory"


def test_the_distributed_optimizer_is_kept(setup, ranks, half, tmp_path):
    run = half("by-name", tmp_path / "run")
    argv = setup.flags(setup.sources("both", *BOTH), "--save", str(run), *SCHEDULE)
    argv.remove("--use-distributed-optimizer")
    with pytest.raises(RankError) as failure:
        ranks(1, "support.tools:command", "megatron_infifpo.train", argv)
    assert failure.value.codes == [2]
    assert "use distributed optimizer was True and is False" in failure.value.logs[0]


SAVED = {"use_distributed_optimizer": True, "data_parallel_size": 8, "transformer_impl": "local"}


def test_kinds_of_layers():
    """Their parameters have the same names and sizes, but another order in the buffers."""
    run = SAVED | {"transformer_impl": "transformer_engine"}
    found = differences(SAVED, run, "dp_reshardable")
    assert found == ["transformer impl was local and is transformer_engine"]
    assert not differences(SAVED, run, "fully_reshardable")


def test_bucket_size():
    """Megatron's default grows with the data-parallel size: a run may leave a checkpoint behind."""
    overlapped = SAVED | {"overlap_grad_reduce": True}
    assert bucket_size(SAVED) is None
    assert bucket_size(overlapped) == bucket_size(overlapped | {"data_parallel_size": 40})
    wide = overlapped | {"data_parallel_size": 64}
    assert bucket_size(wide) == 64_000_000
    assert "in buckets of 40000000 parameters" in differences(overlapped, wide, "dp_reshardable")[0]
    fixed = {"ddp_bucket_size": 40_000_000}
    assert not differences(overlapped, wide | fixed, "dp_reshardable")
