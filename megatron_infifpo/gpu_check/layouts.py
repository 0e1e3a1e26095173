"""Group 6: the same losses and gradients at every parallel layout that the devices allow."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_infifpo.bench.jobs import training_flags
from megatron_infifpo.engine.environment import installed
from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.jobs import CALM, SMALL, TITLES, prepare, train
from megatron_infifpo.gpu_check.records import Options, Recorder, Result

STEPS = 3
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
CP, VPP = "--context-parallel-size", "--num-virtual-stages-per-pipeline-rank"
# Of a loss, and of a gradient's norm.
FP32, BF16 = (1e-4, 1e-4), (5e-3, 0.03)
HANGS = 180.0  # seconds after which GPUs are taken to wait for each other
TAKE = 2  # ranks of a CPU with --quick; else `MORE`
MORE = 4


@dataclass(frozen=True)
class Layout:
    """Ranks and flags."""

    name: str
    ranks: int
    flags: tuple[str, ...]
    quick: bool = False


LAYOUTS = (
    Layout("TP2", 2, (TP, "2"), quick=True),
    Layout("PP2", 2, (PP, "2"), quick=True),
    Layout("DP2", 2, ()),
    Layout("TP2 with sequence parallelism", 2, (TP, "2", "--sequence-parallel")),
    Layout("CP2", 2, (CP, "2")),
    Layout("TP2 CP2 with sequence parallelism", 4, (TP, "2", CP, "2", "--sequence-parallel")),
    Layout("PP4", 4, (PP, "4")),
    Layout("TP2 PP2", 4, (TP, "2", PP, "2")),
    Layout("PP4 VPP2 DP2", 8, (PP, "4", VPP, "2")),
    Layout("TP2 PP2 DP2", 8, (TP, "2", PP, "2")),
)
LOCAL = ("--transformer-impl", "local")


def check(options: Options, record: Recorder) -> None:
    """Compare every layout with one rank: in float32, and in bfloat16 on the default layers."""
    devices = options.devices if options.cuda else TAKE if options.quick else MORE
    fitting = [x for x in LAYOUTS if x.ranks <= devices and (x.quick or not options.quick)]
    for layout in LAYOUTS:
        if layout.ranks > devices:
            record.skip(layout.name, f"it needs {layout.ranks} devices, here are {devices}")
    if not fitting:
        return
    folder = Path(options.folder)
    prepare(folder, "llama", num_hidden_layers=8 if devices >= 8 else 4, **CALM)
    precisions: dict[str, tuple[tuple[str, ...], tuple[float, float]]] = {"fp32": (LOCAL, FP32)}
    if options.cuda and installed("transformer_engine"):
        precisions["te bf16"] = (("--bf16",), BF16)
    seconds = HANGS if options.cuda else options.seconds / 2
    for precision, (flags, limits) in precisions.items():
        one = Layout("one rank", 1, ())
        expected: dict[str, Any] = {}
        with record.check(f"{precision}: {one.name}") as alone:
            expected = run(one, flags, folder / precision, options, seconds)
            alone.peak_mib = expected["peak_mib"]
        if not expected:
            continue
        for layout in fitting:
            norms = Result()
            name = f"{precision}: {layout.name}"
            with record.check(f"{name}, {TITLES['losses']}", unit="relative") as losses:
                found = run(layout, flags, folder / precision, options, seconds)
                losses.value, losses.limit = distance(found, expected, "losses"), limits[0]
                norms.value, norms.limit = distance(found, expected, "norms"), limits[1]
                losses.peak_mib = found["peak_mib"]
            record.result(f"{name}, {TITLES['norms']}", norms, unit="relative")


def run(
    layout: Layout, flags: tuple[str, ...], folder: Path, options: Options, seconds: float
) -> dict[str, Any]:
    """Train at a layout; losses of a last pipeline stage, norms, and memory of the fullest rank."""
    argv = [*training_flags(Path(options.folder), STEPS), *SMALL, *flags, *layout.flags]
    argv += ["--lr", "1e-3", "--micro-batch-size", "2", "--global-batch-size", "16"]
    ranks = processes.run(
        f"{train.__module__}:{train.__name__}",
        {"argv": argv},
        folder / layout.name.replace(" ", "-"),
        seconds=seconds,
        ranks=layout.ranks,
    )
    last = next(x for x in reversed(ranks) if x["losses"][0] == x["losses"][0])  # not NaN
    return last | {"peak_mib": max(x["peak_mib"] for x in ranks)}


def distance(found: dict[str, Any], expected: dict[str, Any], key: str) -> float:
    """Largest relative difference over steps."""
    pairs = zip(found[key], expected[key], strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)
