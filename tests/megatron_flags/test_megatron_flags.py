"""The table of Megatron's flags: whole, true to Megatron and to the program, and acted on."""

import re

import pytest

from megatron_infifpo.gpu_check import flags
from megatron_infifpo.gpu_check.records import Options
from megatron_infifpo.megatron_flags.gpu_runs import FLASH, GPU_RUNS, NVML, TE
from support.launcher import ROOT

WORKS, GPU, CHECKPOINT, FIXED = "works", "gpu", "checkpoint", "fixed"
DEVICE, REFUSED = "device", "refused"


@pytest.fixture(scope="module")
def table(ranks):
    return ranks(1, "support.flag_table:table")[0]


def test_every_flag_has_one_class(table):
    """A new version of Megatron fails here until somebody has looked at what is new in it."""
    unknown = [name for name, (*_, found) in table["classes"].items() if found is None]
    assert not unknown, "flags that are not in the table"
    there, named = table["groups"]
    assert there == named, "groups of flags that only Megatron has, or only the table"
    assert not table["useless"], "names in the table that Megatron does not have"
    assert not table["repeated"], "flags that are named twice"
    assert not table["conditions"], "conditions on flags that Megatron does not have"
    assert len(table["classes"]) > 800


def test_the_table_says_what_the_program_does(table, ranks):
    """What it calls set is what the checkpoint, the program and the CPU's stand-ins set."""

    def of(kind: str) -> set[str]:
        return {name for name, (*_, found) in table["classes"].items() if found[0] == kind}

    program = ranks(1, "support.flag_table:set_by_the_program")[0]
    # Gemma's activation has none of these kernels, so that its checkpoints set them too.
    kernels = {"bias_gelu_fusion", "bias_swiglu_fusion"}
    assert of(CHECKPOINT) == program["checkpoint"] - kernels
    assert of(FIXED) == program["fixed"]
    assert of(DEVICE) <= program["device"]
    assert program["device"] | program["kind"] <= of(DEVICE) | of(GPU) | of(WORKS)


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_each_flag_alone(table, ranks, gpu):
    """With another value than its default, each flag is let through or refused as it is classed."""
    found = ranks(1, "support.flag_table:each_alone", gpu)[0]
    on_cpu = ranks(1, "support.flag_table:set_by_the_program")[0]["device"]
    seen = set()
    for option, (name, sentences) in found.items():
        seen.add(name)
        kind, why = table["classes"][name][2]
        if not gpu and name in on_cpu:
            expected = None
        elif kind == GPU:
            expected = None if gpu else "it is for GPUs, and this run is on a CPU"
        else:
            expected = why if kind in (REFUSED, DEVICE) else None
        refused = [sentence for sentence in sentences if "not supported" in sentence]
        if expected is None:
            assert not refused, option
        else:
            assert refused == [f"{option} is not supported: {expected}; leave it out"], option
    all_flags = set(table["classes"])
    assert len(seen) > 790 and all_flags - seen <= {"ckpt_format"}, all_flags - seen


# What cannot be, flags that are let through once the need is met, and part of the sentence.
TOGETHER = [
    ("--sgd-momentum 0.5", "--optimizer sgd", "no effect without --optimizer sgd"),
    ("--recompute-modules mlp", "--recompute-activations", "--recompute-granularity selective"),
    ("--adam-eps 1e-6 --adam-beta1 0.8", "", None),
    ("--optimizer sgd --adam-eps 1e-6", None, "--adam-eps has no effect without --optimizer adam"),
    ("--lr-wsd-decay-iters 3", "--lr-decay-style WSD", "--lr-decay-style WSD"),
    ("--loss-scale 8", "--fp16", "--fp16"),
    ("--hysteresis 3", "--fp16", "--fp16, or with --loss-scale"),
    ("--fp16 --loss-scale 8 --hysteresis 3", None, "--fp16, or with --loss-scale"),
    ("--ddp-num-buckets 2", "--overlap-grad-reduce", "--overlap-grad-reduce"),
    ("--async-save --async-strategy mcore", "--use-persistent-ckpt-worker", "worker"),
    ("--log-progress", "--save x", "--save"),
    ("--eval-interval 3", "--preference-valid-data x", "--preference-valid-data"),
    ("--profile-ranks 0", "--profile --use-pytorch-profiler --tensorboard-dir x", "--profile"),
    (
        "--no-overlap-p2p-communication",
        "--num-virtual-stages-per-pipeline-rank 2",
        "interleaved stages",
    ),
    ("--optimizer sgd --use-distributed-optimizer", None, "leave one of them out"),
    ("--lr-decay-style WSD", "--lr-wsd-decay-iters 3", "--lr-wsd-decay-iters"),
    (
        "--recompute-granularity full",
        "--recompute-method uniform --recompute-num-layers 1",
        "--recompute-method",
    ),
    (
        "--distribute-saved-activations --sequence-parallel --recompute-granularity full "
        "--recompute-method uniform --recompute-num-layers 1",
        None,
        "--sequence-parallel",
    ),
    ("--async-save --use-persistent-ckpt-worker", "--async-strategy mcore", "mcore"),
    (
        "--profile --use-pytorch-profiler",
        "--tensorboard-dir x",
        "--use-pytorch-profiler writes beside --tensorboard-dir",
    ),
    ("--profile", "--use-pytorch-profiler --tensorboard-dir x", "Nsight"),
    ("--optimizer lion", None, "--optimizer lion is not supported"),
    (
        "--recompute-activations --recompute-modules layernorm mlp",
        None,
        "compiles C++ while it trains; expected core",
    ),
    ("--ckpt-format torch", None, "expected torch_dist"),
    ("--dist-ckpt-strictness ignore_all", None, "ignore_all is not supported"),
    ("--transformer-impl inference_optimized", None, "expected transformer_engine, local"),
    ("--rerun-mode report_stats", None, "expected validate_results, disabled"),
    ("--no-masked-softmax-fusion --num-workers 0", "", None),
]
TOGETHER_ON_GPUS = [
    ("--attention-backend flash", "--te-attention", "no effect without --te-attention"),
    ("--te-attention --attention-backend local", None, "expected flash, fused, unfused, auto"),
    ("--fp8-recipe tensorwise", "--fp8-format hybrid", "--fp8-format"),
    ("--fp8-format hybrid --fp8-recipe custom", None, "code of your own"),
    ("--fp8-format hybrid --mlp-chunks-for-training 2", None, "leave one of them out"),
    ("--use-precision-aware-optimizer", None, "Transformer Engine installed"),
    ("--optimizer-offload-fraction 0.5", None, "no effect without --optimizer-cpu-offload"),
    (
        "--bf16 --optimizer-cpu-offload --optimizer-offload-fraction 0.5",
        None,
        "--optimizer-cpu-offload needs --use-precision-aware-optimizer",
    ),
    ("--exp-avg-dtype bf16", None, "--use-precision-aware-optimizer"),
    ("--log-energy", None, "nvidia-ml-py installed"),
    ("--profile", "", None),
    ("--no-masked-softmax-fusion", None, "no such kernel"),
    ("--distributed-backend gloo", None, "nccl"),
]


HOST = "--use-distributed-optimizer --use-precision-aware-optimizer --optimizer-cpu-offload"
WITH_PACKAGES = [
    (HOST, "--bf16", "needs --bf16 or --fp16"),
    (f"--bf16 {HOST} --optimizer-offload-fraction 0", None, "--optimizer-offload-fraction above 0"),
    (f"--bf16 {HOST} --exp-avg-dtype bf16", None, "or with --optimizer-cpu-offload: leave it out"),
    (f"--bf16 {HOST} --no-pin-cpu-params", None, "it has no effect"),
]


@pytest.mark.parametrize(
    ("cases", "where"),
    [(TOGETHER, ()), (TOGETHER_ON_GPUS, (True,)), (WITH_PACKAGES, (True, True))],
    ids=["cpu", "gpu", "packages"],
)
def test_what_must_go_together(ranks, cases, where):
    alone = [case.split() for case, *_ in cases]
    mended = [f"{case} {remedy or ''}".split() for case, remedy, _ in cases]
    before, after = (
        ranks(1, "support.flag_table:say", lines, *where)[0] for lines in (alone, mended)
    )
    for (case, remedy, expected), said, then in zip(cases, before, after, strict=True):
        if expected is None:
            assert not said, case
            continue
        assert len(said) == 1 and expected in said[0], (case, said)
        if remedy is not None:
            assert not then, (case, remedy, then)


def test_all_refusals_at_once(ranks):
    argv = ["--spec", "x", "--tokenizer-type", "NullTokenizer", "--lr", "1e-3", "--sft"]
    said = ranks(1, "support.flag_table:say", [argv])[0][0]
    assert [sentence.split()[0] for sentence in said] == ["--tokenizer-type", "--spec", "--sft"]


def test_working_flags_are_seen_to_work(table):
    """Each is on the command line of some test, none of which is in this file."""
    files = [
        path for path in (ROOT / "tests").rglob("*.py") if path.name != "test_megatron_flags.py"
    ]
    words = set(re.findall(r"--[\w-]+", "\n".join(path.read_text() for path in files)))
    unseen = [
        name
        for name, (_, options, found) in table["classes"].items()
        if found[0] == WORKS and not words & set(options)
    ]
    assert not unseen


def test_flags_for_gpus_are_run_on_gpus(table, ranks):
    """tools/gpu_check.py has runs with each of them, in combinations that are let through."""
    assert not any(ranks(1, "support.flag_table:gpu_runs")[0])
    words = {word for run in GPU_RUNS for word in run.flags}
    unseen = [
        name
        for name, (_, options, found) in table["classes"].items()
        if found[0] == GPU and not words & set(options)
    ]
    assert not unseen


def test_runs_of_a_machine():
    """What a machine lacks is left out, for a reason."""
    cuda = Options("cuda", False, 1, (), "", 60.0)
    runs, skipped = flags.choose(cuda, packages={TE, NVML, FLASH}, fp8=True)
    assert tuple(runs) == GPU_RUNS and not skipped
    runs, skipped = flags.choose(cuda, packages={TE, NVML, FLASH}, fp8=False)
    assert [run.fp8 for run in GPU_RUNS].count(True) == len(skipped) == len(GPU_RUNS) - len(runs)
    runs, skipped = flags.choose(cuda, packages={NVML}, fp8=True)
    assert {run.package for run in runs} == {None, NVML}
    assert set(skipped.values()) == {f"{name} is not installed" for name in (TE, FLASH)}


def test_page(ranks):
    written = (ROOT / "docs" / "megatron-flags.md").read_text()
    made = ranks(1, "support.flag_table:page")[0]
    assert made == written, "run: python -m megatron_infifpo.megatron_flags.page"
