"""What the checks find when something is wrong, and what they do on a GPU that is not here."""

import contextlib
import math
import sys
import types
import warnings

import pytest
import torch

from megatron_infifpo.gpu_check import attention, environment, families, head, throughput, training
from megatron_infifpo.gpu_check.records import (
    FAILED,
    MEASURED,
    MISSED,
    PASSED,
    SKIPPED,
    Options,
    Recorder,
    Result,
    read_checks,
)
from megatron_infifpo.gpu_check.rows import random_pairs
from megatron_infifpo.gpu_check.waits import Waits
from megatron_infifpo.patches import cpu
from megatron_infifpo.planning.plan import GIB
from support import tiny

cpu.enable(announce=False)
CPU = Options("cpu", True, 2, ("tiny",), "", 60.0)
CUDA = Options("cuda", False, 1, ("7b",), "", 600.0)


def found(recorder: Recorder) -> dict:
    return {check.name: check for check in read_checks(recorder.path)}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "dtype, sinks", [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)]
)
def test_attention_that_sees_one_token_too_many_fails(monkeypatch, dtype, sinks, shared):
    case = attention.Case(64, shared, True, 2, dtype, sinks)
    errors, limits, difference = attention.compare(case, "cpu")
    assert difference == 0.0
    assert all(error <= limit for error, limit in zip(errors, limits, strict=True))
    make = attention.make_attention

    def wider(case):
        module = make(case)
        module.window += 1
        return module

    # The reference keeps the window that the case asks for.
    plain = attention.reference
    monkeypatch.setattr(attention, "make_attention", wider)
    monkeypatch.setattr(attention, "reference", lambda i, row, window: plain(i, row, window - 1))
    errors, limits, _ = attention.compare(case, "cpu")
    assert all(error > 2 * limit for error, limit in zip(errors, limits, strict=True))


def test_attention_with_wrong_sinks_fails(monkeypatch):
    case = attention.Case(64, True, False, 2, torch.float32, sinks=True)
    plain = attention.reference
    monkeypatch.setattr(
        attention, "reference", lambda i, row, window: plain((*i[:3], i[3] + 0.1), row, window)
    )
    errors, limits, _ = attention.compare(case, "cpu")
    assert len(errors) == 5
    assert all(error > 2 * limit for error, limit in zip(errors, limits, strict=True))


def test_rows_have_a_segment_of_one_token_shared_or_not():
    for shared in (True, False):
        row = attention.make_row(shared)
        assert min(row["segment_lengths"]) == 1
        assert ("key_rows" in row) == shared


def exceeds(result: Result) -> bool:
    assert result.value is not None and result.limit is not None
    return result.value > result.limit


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ids", [1, 3])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_a_head_that_errs_fails(monkeypatch, one_rank, dtype, error, ids):
    exact = head.vocab_parallel_logprobs
    results = [Result(), Result(), Result()]
    head.compare(CPU, dtype, None, ids, *results)
    assert not any(map(exceeds, results))

    def wrong(hidden, weight, *args, **options):
        return exact(hidden * (1 + error), weight, *args, **options)

    monkeypatch.setattr(head, "vocab_parallel_logprobs", wrong)
    results = [Result(), Result(), Result()]
    head.compare(CPU, dtype, None, ids, *results)
    assert exceeds(results[0]) and exceeds(results[1])


def test_gradients_are_compared_by_parameter():
    exact = {"big": torch.full((4,), 10.0), "small": torch.full((4,), 1e-3)}
    near = {"big": torch.full((4,), 10.1), "small": torch.full((4,), 2e-3)}
    error, name = families.largest_error(near, exact)
    assert name == "big" and error == pytest.approx(0.01, rel=1e-4)
    # A hundredth of the whole gradient is what a small one is held to.
    far = {"big": exact["big"], "small": torch.full((4,), 0.101)}
    error, name = families.largest_error(far, exact)
    assert name == "small" and error == pytest.approx(0.2 / (0.01 * 20.0), rel=1e-4)


def test_gradients_are_collected_as_megatron_does():
    def parameter(added: bool, tied: bool = False) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            main_grad=torch.tensor([2.0]),
            grad=torch.tensor([1.0]),
            grad_added_to_main_grad=added,
            zero_out_wgrad=tied,
        )

    assert families.collected(parameter(False)).item() == 3.0
    assert families.collected(parameter(True)).item() == 2.0, "a fused product has added it"
    assert families.collected(parameter(True, tied=True)).item() == 3.0


MISTAKES = """
def inside(x):
    x.sum().item()
    x.new_tensor([1.0])
def outside(x):
    x.cpu()
"""


def test_waits_of_a_cpu_are_what_would_wait_for_a_gpu():
    made: dict = {}
    exec(compile(MISTAKES, "/site-packages/megatron/made_up.py", "exec"), made)
    waits, value = Waits(cuda=False), torch.ones(3)
    with waits.micro_batch():
        made["inside"](value)  # of the first step, which warms up
    for _ in range(2):
        with waits.step():
            with waits.micro_batch():
                made["inside"](value)
            made["outside"](value)
    assert waits.inside == {"wait made_up.inside": 2, "constant made_up.inside": 2}
    assert waits.outside == {"wait made_up.outside": 2}


def test_waits_of_a_gpu_are_its_own_warnings(monkeypatch):
    modes: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    waits = Waits(cuda=True)
    with warnings.catch_warnings(), waits.step():
        with waits.micro_batch():
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert modes == ["warn", "default"]
    assert sum(waits.inside.values()) == 1 and sum(waits.outside.values()) == 2
    assert "test_checks.py" in next(iter(waits.inside))


@pytest.mark.parametrize("te, fp8", [(False, False), (True, False), (True, True)])
def test_training_plan(te, fp8):
    plan = training.make_plan(te=te, fp8=fp8, exact=not te)
    first, second = ({run.name: run for run in wave} for wave in plan.waves)
    assert all(run.source is None for run in first.values())
    assert all(run.source in first for run in second.values())
    names = first.keys() | second.keys()
    assert all({c.run, c.other} <= names for c in plan.comparisons)
    assert second["fp32-resumed"].flags == first["fp32"].flags
    assert ("fp8" in first) == fp8 and ("FP8" in plan.skipped) == (not fp8)
    assert {run.name for run in first.values() if run.hide} == {"fp32", "bf16"}
    if te:  # both directions, with one optimizer
        assert first["te"].flags == second["local-to-te"].flags
        assert "local" not in first["te"].flags
        assert first["fused"].flags == second["te-to-local"].flags
    exact = plan.comparisons[0].limits == (0.0, 0.0)
    assert exact == (not te)


def test_last_steps_are_compared():
    assert training.difference([4.0, 8.0], [9.0, 9.0, 4.0, 8.0]) == 0.0
    assert training.difference([4.0, 9.0], [9.0, 9.0, 4.0, 8.0]) == pytest.approx(0.125)


@pytest.mark.parametrize(
    "gpu, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_rates(gpu, tflops):
    assert throughput.peak_rate(gpu) == (tflops and tflops * 1e12)


@pytest.fixture
def a_gpu(monkeypatch):
    """Let code think that there is an H100 with so much free memory."""

    def free(gib: float, name: str = "NVIDIA H100 80GB HBM3") -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(gib * GIB), int(80 * GIB)))

    return free


@pytest.mark.parametrize("gib", [20, 40, 79, 140])
def test_as_many_layers_as_fit(a_gpu, tmp_path, gib):
    a_gpu(gib)
    for name, whole in (("0.5b", 24), ("7b", 28)):
        shape = throughput.Shape(CUDA, Recorder("t", tmp_path / "c"), name)
        layers = shape.fitting_layers()
        assert 0 <= layers <= whole
        if layers:
            assert shape.planned(shape.make_plan(layers)).total <= throughput.FREE * gib * GIB
    assert layers == {20: 0, 40: 1, 79: 6, 140: 14}[gib], "of 7b"


def measured(shape, ours: dict, trl: dict) -> None:
    shape.name = "7b, 6 of 28 layers"
    shape.plan = shape.make_plan(6)
    shape.found = {throughput.OURS: ours, throughput.TRL: trl}
    shape.ours()
    shape.beside(throughput.TRL)


@pytest.mark.parametrize(
    "gpu, expected", [("NVIDIA H100 80GB HBM3", PASSED), ("NVIDIA A100-SXM4-80GB", MEASURED)]
)
def test_only_an_h100_has_limits(a_gpu, monkeypatch, tmp_path, gpu, expected):
    a_gpu(79, gpu)
    record = Recorder("throughput", tmp_path / "checks.jsonl")
    shape = throughput.Shape(Options("cuda", False, 1, ("7b",), str(tmp_path), 60.0), record, "7b")
    shape.folder.mkdir()
    monkeypatch.setattr(throughput, "model_operations", lambda job, shared: 1e15)
    common = {"peak": 6e14, "later_mib": 0.0, "loss": 0.7}
    ours = common | {"seconds": 2.0, "mib": 30_000.0, "kept_mib": 25_000.0}
    trl = common | {"seconds": 6.0, "mib": 60_000.0, "kept_mib": 40_000.0}
    measured(shape, ours, trl)
    checks = {name.split(": ", 1)[1]: check for name, check in found(record).items()}
    limited = ("MFU", "pairs/s beside TRL", "memory beside TRL")
    peak = throughput.peak_rate(gpu) or math.nan
    for name, value in zip(limited, (1e15 / 2.0 / peak, 3.0, 0.5), strict=True):
        assert checks[name].value == pytest.approx(value) and checks[name].status == expected
    beyond = checks["memory beyond weights, gradients and optimizer beside TRL"]
    assert beyond.value == 0.25 and checks["pairs"].value == 4.0
    assert checks["first loss beside TRL's"].status == PASSED
    assert checks["peak memory of a save"].status == SKIPPED  # too large a checkpoint
    ours["seconds"], ours["loss"] = 3.0, 0.9
    record.path.unlink()
    measured(shape, ours, trl)
    checks = {name.split(": ", 1)[1]: check for name, check in found(record).items()}
    slow = MISSED if expected == PASSED else MEASURED
    assert checks["pairs/s beside TRL"].status == slow, "said, and no failure"
    assert checks["first loss beside TRL's"].status == FAILED, "whatever the GPU"


def test_pairs_have_the_length_that_is_wanted(tmp_path):
    from megatron_infifpo.gpu_check.shapes import TOKENS, make_pairs
    from megatron_infifpo.gpu_check.tiny import save_tokenizer
    from megatron_infifpo.tokens.tokenization import ChatTokenizer

    save_tokenizer(tmp_path, TOKENS)
    tokenizer = ChatTokenizer.from_pretrained(tmp_path)
    for record in make_pairs(2, 100, 30):
        tokens = tokenizer.encode(record)
        assert len(tokens.prompt_ids) == 100
        assert [len(ids) for ids in tokens.response_ids] == [30, 30]


def test_why_cuda_cannot_be_used(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "made without CUDA" in str(environment.cuda_problem())
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue\nGCC: 12\n")
    monkeypatch.setattr("megatron_infifpo.engine.environment.DRIVER", driver)
    said = str(environment.cuda_problem())
    assert "too old" in said and "535.54.03" in said and "CUDA 13.0" in said
    record = Recorder("environment", tmp_path / "checks.jsonl")
    result = environment.check(CUDA, record)
    assert result["unusable"] == said and found(record)["CUDA"].status == FAILED


@pytest.mark.parametrize("broken", [True, False])
def test_a_broken_package_says_why(monkeypatch, tmp_path, broken):
    package = tmp_path / "sometimes_broken"
    package.mkdir()
    text = 'raise RuntimeError("install me for your CUDA")' if broken else '__version__ = "2.20"'
    (package / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    record = Recorder("environment", tmp_path / "checks.jsonl")
    with contextlib.ExitStack() as stack:
        stack.callback(sys.modules.pop, "sometimes_broken", None)
        environment.check_import(record, "it", "sometimes_broken", "sometimes_broken")
        environment.check_import(record, "other", "surely_not_there", "surely_not_there")
    it = found(record)["it"]
    assert it.status == (FAILED if broken else PASSED)
    assert it.note == ("RuntimeError: install me for your CUDA" if broken else "2.20")
    assert found(record)["other"].status == SKIPPED


def test_experts_are_computed_in_float64(tmp_path):
    """What all else is compared with: transformers' grouped products would not take it."""
    pairs = random_pairs(families.LENGTHS, families.VOCABULARY - 1)
    folder = tiny.save_model(tmp_path / "hf", "gpt_oss", vocab_size=families.VOCABULARY)
    exact, close = (
        families.in_transformers(folder, pairs, dtype, "cpu")
        for dtype in (torch.float64, torch.float32)
    )
    assert 0 < (exact.logprobs - close.logprobs).abs().max() < 1e-4
    assert any("experts" in name for name in exact.gradients)
