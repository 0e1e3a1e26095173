"""Adapters train at every layout as on one rank; their checkpoints hold nothing else."""

from pathlib import Path

import pytest

from megatron_infifpo.convert.hf_export import export_checkpoint
from megatron_infifpo.convert.summary import describe
from megatron_infifpo.errors import UserError
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint
from megatron_infifpo.training.config import RunConfig
from megatron_infifpo.training.folders import Folders
from megatron_infifpo.training.lora import lora_of
from megatron_infifpo.training.start import find_start
from support import tiny
from support.launcher import refused
from support.runs import BOTH, LAYOUTS, steps_of

TRAIN = "support.training:train"
LORA = ["--lora-rank", "4", "--lora-alpha", "12", "--lr", "1e-2"]


@pytest.fixture(scope="module")
def flags(setup):
    def make(*more: str, lora: list[str] = LORA) -> list[str]:
        return setup.flags(setup.sources("both", *BOTH), *lora, *more)

    return make


def losses(found: list[dict]) -> list[float]:
    return [step["loss"] for step in steps_of(found)]


@pytest.fixture(scope="module")
def straight(flags, ranks) -> dict:
    """Three steps on one rank."""
    (record,) = ranks(1, TRAIN, flags())
    return record


@pytest.fixture(scope="module")
def run(flags, ranks, tmp_path_factory) -> Path:
    """Two of the three steps, on two tensor-parallel ranks, saved for any layout."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    more = ["--save", str(folder), "--stop-at", "2", "--dist-ckpt-optim-fully-reshardable"]
    ranks(2, TRAIN, flags(*LAYOUTS["tp2-sp"][1], *more))
    return folder


def test_loss_moves(straight):
    first, *_, last = losses([straight])
    assert abs(last - first) > 0.02


@pytest.mark.parametrize(
    ("layout", "more"),
    [
        ("tp2", ["--overlap-grad-reduce", "--overlap-param-gather"]),
        ("tp2-sp", []),
        ("pp2-vpp2", []),
        ("cp2", []),
        ("dp2", ["--overlap-grad-reduce", "--overlap-param-gather"]),
        (
            "pp2",
            ["--recompute-granularity", "full", "--recompute-method", "uniform"]
            + ["--recompute-num-layers", "1"],
        ),
    ],
    ids=["tp2", "tp2-sp", "pp2-vpp2", "cp2", "dp2", "pp2-recompute"],
)
def test_layouts(ranks, flags, straight, layout, more):
    world, parallel = LAYOUTS[layout]
    found = ranks(world, TRAIN, flags(*parallel, *more))
    assert "the pivot agrees" in ranks.logs[0]
    assert losses(found) == pytest.approx(losses([straight]), abs=2e-5)
    assert found[0]["norms"] == pytest.approx(straight["norms"], rel=1e-4)


def test_checkpoint_of_adapters_alone(run):
    """Adapters, and two moments and a main parameter of each; the base is not there."""
    checkpoint = TorchDistCheckpoint(run / "iter_0000002")
    assert {name.rsplit(".", 1)[1] for name in checkpoint.names()} == {"lora_a", "lora_b"}
    metadata = checkpoint._metadata.state_dict_metadata
    tensors = {k: v.size.numel() for k, v in metadata.items() if hasattr(v, "size")}
    weights = sum(n for k, n in tensors.items() if not k.startswith("optimizer."))
    state = sum(n for k, n in tensors.items() if k.startswith("optimizer.state."))
    hidden, kv, ffn, layers, rank = 64, 32, 96, 4, 4
    own = 4 * hidden + 2 * (hidden + kv) + 2 * (hidden + ffn) + (ffn + hidden)
    assert weights == layers * rank * own and state == 3 * weights


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2"])
def test_resume(ranks, flags, straight, run, tmp_path, layout):
    """The third step is that of a run without a stop; the pivot is checked without adapters."""
    world, parallel = LAYOUTS[layout]
    more = ["--load", str(run), "--save", str(tmp_path / "on")]
    found = ranks(world, TRAIN, flags(*parallel, *more, "--dist-ckpt-optim-fully-reshardable"))
    assert "the pivot has moved" in ranks.logs[0] and "the pivot agrees" in ranks.logs[0]
    assert losses(found) == pytest.approx(losses([straight])[2:], abs=2e-5)
    assert found[0]["norms"] == pytest.approx(straight["norms"][2:], rel=1e-4)


def begins(argv: list[str]):
    """What a run would begin with, and its adapters."""
    config = RunConfig.from_arguments(argv)
    start = find_start(Folders.read(config.flags), lora=config.lora_rank is not None)
    return start, lora_of(config, start)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--lora-rank", "8"], "trains adapters of rank 4 of .*: rank 8 of"),
        (["--lora-rank", "4", "--lora-targets", "q_proj"], "rank 4 of q_proj would be others"),
        (["--lora-rank", "4", "--lora-targets", "wq"], "wq is no linear layer .* q_proj, k_proj"),
        (["--lora-rank", "33"], "--lora-rank is 33, expected at most 32: k_proj has 32 x 64"),
        (["--lora-rank", "4", "--lora-alpha", "0"], "--lora-alpha is 0.0, expected a number"),
        (["--lora-alpha", "4"], "--lora-alpha has no effect without --lora-rank"),
        ([], "trains adapters of rank 4: give --lora-rank 4 to go on"),
    ],
)
def test_other_adapters_are_refused(flags, run, own, said):
    with pytest.raises(UserError, match=said):
        begins(flags("--save", str(run), lora=own))


def test_base_is_found_again(setup, flags, run):
    """Where it was, if nobody says that it has moved."""
    argv = flags("--save", str(run))
    at = argv.index("--pretrained-checkpoint")
    start, adapters = begins(argv[:at] + argv[at + 2 :])
    assert start.own == setup.pivot and start.step == 2
    assert adapters.targets[:2] == ("down_proj", "gate_proj") and adapters.scale == 3.0


def test_other_base_is_refused(setup, ranks, flags, run, tmp_path):
    """One of the same shapes; not even --allow-changed-run lets it pass."""
    other = tiny.save_model(tmp_path / "other", "llama", seed=99)
    argv = flags("--save", str(run), "--allow-changed-run")
    argv[argv.index("--pretrained-checkpoint") + 1] = str(other)
    said = refused(ranks, "megatron_infifpo.train", argv)
    assert "has other weights" in said and "than the base that the adapters were trained on" in said
    with pytest.raises(UserError, match="has other weights .* give that one"):
        export_checkpoint(run, tmp_path / "out", base=other)
    with pytest.raises(UserError, match="--base has no effect: .* holds whole weights"):
        export_checkpoint(setup.pivot, tmp_path / "out", base=other)
    export_checkpoint(run, tmp_path / "out", base=setup.hf)  # what the pivot was imported from
    assert describe(run)["adapters"].startswith("rank 4, alpha 12, of down_proj, gate_proj")


def test_whole_run_is_no_run_of_adapters(ranks, flags, tmp_path):
    ranks(1, TRAIN, flags("--save", str(tmp_path), "--stop-at", "1", lora=[]))
    with pytest.raises(UserError, match="trains the whole model: leave --lora-rank out"):
        begins(flags("--save", str(tmp_path)))


def test_new_run_from_base_and_adapters(ranks, flags, run, tmp_path):
    """The whole model is trained from a run of adapters as from what that exports to."""
    merged = tmp_path / "merged"
    ranks(1, "support.tools:export", str(run), str(merged))
    found = []
    for pivot in (run, merged):
        argv = flags("--reference-check", "off", lora=[])
        argv[argv.index("--pretrained-checkpoint") + 1] = str(pivot)
        (record,) = ranks(1, TRAIN, argv)
        found.append((losses([record]), record["norms"]))
    assert found[0] == found[1]


def test_memory(ranks, flags):
    """In bfloat16, 2 bytes of a frozen weight and 18 of others: main parameters, two moments."""
    hidden, kv, ffn, layers, rank, vocab = 64, 32, 96, 4, 4, 384  # with its padding
    product = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn
    base = 2 * vocab * hidden + layers * (product + 2 * hidden) + hidden
    own = layers * rank * (4 * hidden + 2 * (hidden + kv) + 3 * (hidden + ffn))
    for lora, frozen, trained in ((LORA, base, own), ([], 0, base)):
        (held,) = ranks(1, "support.lora:held_bytes", flags("--bf16", lora=lora))
        assert held["parameters"] == pytest.approx(2 * (frozen + trained), abs=512)  # padding
        assert held["gradients"] == pytest.approx(4 * trained, abs=512)
        assert held["others"] == pytest.approx(12 * trained, abs=50_000)
