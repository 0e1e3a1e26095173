"""The fastest plan that fits so many GPUs: what it takes, what that costs, and its flags."""

from typing import Any

import pytest
import torch

from megatron_infifpo.commands.main import make_parser
from megatron_infifpo.errors import UserError
from megatron_infifpo.megatron_flags.check import GROUPS
from megatron_infifpo.megatron_flags.group import GPU
from megatron_infifpo.planning.estimate import estimate, estimate_at
from megatron_infifpo.planning.fit import AWARE, EXACT, MEASURES, MOMENTS, OFFLOAD, RECOMPUTE, fit
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout
from megatron_infifpo.planning.models import planned_model
from megatron_infifpo.planning.plan import GIB
from megatron_infifpo.planning.recompute import FULL, NONE
from megatron_infifpo.training.config import RunConfig

SEVENTY = 70_553_706_496  # parameters, published; norms are 0.002 % of them


def job(model: str, gpus: int = 8, **options: Any) -> PlanningJob:
    return PlanningJob(planned_model(model), gpus, **options)


def test_a_model_that_fits_as_it_is():
    """Phi-4 on eight GPUs: the fastest of all layouts, without anything else."""
    asked = job("phi-4")
    found, fitting = fit(asked), [one for one in estimate(asked) if one.fits]
    assert found.measures == () and found.job == asked
    assert found.hours == min(one.hours for one in fitting) == found.spent.total
    assert found.memory.total + 6 * GIB <= 80 * GIB


def test_seventy_billion_on_one_node():
    """Weights and gradients of 6 bytes a parameter, the optimizer's 16 on the host; by hand."""
    found = fit(job("llama-3.3-70b"))
    assert (found.layout, found.recompute) == (Layout(8, 1, 1), NONE)
    assert found.job.optimizer_offload == 1.0 and found.memory.optimizer == 0
    state = found.memory.weights + found.memory.gradients
    assert state == pytest.approx(6 * SEVENTY / 8, rel=1e-4)
    # The state, and a save's copy of the weights: what is on the host already is not copied.
    assert found.host == pytest.approx((16 + 2) * SEVENTY, rel=1e-4)
    (offload,) = found.measures
    assert offload.name == OFFLOAD and offload.without is None
    assert offload.saves == pytest.approx(12 * SEVENTY / 8, rel=1e-4)
    # A step: a float32 gradient there and a bfloat16 parameter back, at 25 GB/s for each GPU; Adam
    # reads four numbers and writes three, and makes a bfloat16 copy, at 200 GB/s for all.
    step = 6 * SEVENTY / 8 / 25e9 + (28 + 6) * SEVENTY / 200e9
    steps = (3 * 75_000 + 75_000) / 128
    assert found.spent.updating == pytest.approx(steps * step / 3600, rel=1e-4)
    assert offload.costs == pytest.approx(found.spent.updating)


def test_more_of_the_optimizer_on_the_host():
    """Half of it costs half the time, and half the bytes."""
    layout = Layout(8, 1, 1)
    half, whole = (
        estimate_at(job("llama-3.3-70b", optimizer_offload=share), layout, FULL)
        for share in (0.5, 1.0)
    )
    assert 2 * half.spent.updating == pytest.approx(whole.spent.updating)
    assert half.memory.optimizer == pytest.approx(6 * SEVENTY / 8, rel=1e-4)
    assert half.spent.recomputing == whole.spent.recomputing > 0


def test_host_memory_is_a_limit():
    with pytest.raises(UserError, match="nothing fits 8 GPUs of 80 GiB, with 900 GiB of host"):
        fit(job("llama-3.3-70b", host_memory=900.0))
    assert not any(one.fits for one in estimate(job("phi-4", host_memory=100.0)))
    assert any(one.fits for one in estimate(job("phi-4", host_memory=200.0)))


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"gpus": 4}, {OFFLOAD}),
        ({"gpus": 8, "gpu_memory": 48.0}, {AWARE, RECOMPUTE}),
        ({"gpus": 8, "micro_batch_tokens": 65_536}, {OFFLOAD, RECOMPUTE}),
    ],
)
def test_what_is_taken(options, taken):
    """The fastest of what may be taken, and what doing without each would cost."""
    asked = job("phi-4", **options)
    found = fit(asked)
    names = {measure.name for measure in found.measures}
    assert names == taken
    for measure in found.measures:
        assert measure.saves > 0 and measure.costs >= 0
        try:
            without: float | None = fit(asked, measures=set(EXACT) - {measure.name}).hours
        except UserError:
            without = None
        assert measure.without == without and (without is None or without >= found.hours)


def test_moments_only_where_asked_for():
    """They take less and no time, but a bfloat16 cannot lose a thousandth of itself."""
    asked = job("mistral-small-24b")
    plain, less = fit(asked), fit(asked, measures=MEASURES)
    assert plain.job.adam_moments == "fp32" and MOMENTS not in EXACT
    assert less.job.adam_moments == "bf16" and less.hours < plain.hours
    assert {"--exp-avg-dtype", "--exp-avg-sq-dtype"} <= set(less.flags)


def test_what_the_job_has_stays():
    """A share that was asked for is not changed, and no lighter optimizer is tried."""
    found = fit(job("phi-4", optimizer_offload=0.5))
    assert found.job.optimizer_offload == 0.5 and found.spent.updating > 0
    assert fit(job("phi-4", torch_adam=True)).job.torch_adam
    fit(job("phi-4", gpus=16, precision="fp32"))


def test_flags_of_training():
    """Training takes them as they are, and they make the layout."""
    words = ["--preference-data", "p", "--preference-sources", "s.yaml"]
    for asked in (job("phi-4"), job("phi-4", 16, micro_batch_tokens=32_768, seq_length=16_384)):
        found = fit(asked, measures=[RECOMPUTE])
        given = RunConfig.from_arguments([*words, *found.flags]).flags
        sizes = [given[f"{x}_parallel_size"] for x in ("tensor_model", "pipeline_model", "context")]
        layout = found.layout
        assert sizes == [layout.tensor, layout.pipeline, layout.context]
        assert (given["recompute_granularity"] or NONE) == found.recompute
        assert given["bf16"] and given["use_distributed_optimizer"]
        assert given["global_batch_size"] == 128


def test_flags_of_the_host():
    """Those of an optimizer on the host are Megatron's, for GPUs."""
    asked = job("phi-4", optimizer_offload=1.0, optimizer_state="by-name", async_save=True)
    text = " ".join(fit(asked).flags)
    assert "--use-precision-aware-optimizer --optimizer-cpu-offload" in text
    assert "--optimizer-offload-fraction 1 " in text
    assert "--dist-ckpt-optim-fully-reshardable --async-save --async-strategy mcore" in text
    table = {name: kind for group in GROUPS.values() for name, kind, _ in group.named()}
    assert table["optimizer_cpu_offload"] == table["optimizer_offload_fraction"] == GPU


def test_precision_aware():
    """10 bytes a parameter in place of 12, and nothing more at the update or a save."""
    layout = Layout(2, 1, 4)
    plain, aware, reduced = (
        job("phi-4", **options).plan.memory(layout, 64, 1)
        for options in (
            {},
            {"precision_aware": True},
            {"precision_aware": True, "grad_reduce_in_bf16": True},
        )
    )
    assert aware.optimizer == pytest.approx(plain.optimizer * 10 / 12)
    assert aware.update == reduced.update == aware.save == 0
    text = " ".join(fit(job("phi-4", precision_aware=True)).flags)
    assert "--use-precision-aware-optimizer --micro" in text


def test_nothing_fits():
    """What would fit is said, and it does."""
    with pytest.raises(UserError) as raised:
        fit(job("llama-3.3-70b", 4))
    first, *ways = str(raised.value).splitlines()
    assert first.startswith("nothing fits 4 GPUs of 80 GiB, with 1800 GiB of host memory a node")
    said = [way.split(":")[0].removeprefix("- ") for way in ways]
    assert said == ["--fit 8", "--lora-rank 16", "--grad-reduce-in-bf16, less exact"]
    for options in ({"gpus": 8}, {"gpus": 4, "lora_rank": 16}):
        fit(job("llama-3.3-70b", **options))
    fit(job("llama-3.3-70b", 4, grad_reduce_in_bf16=True))


def test_shorter_texts_would_fit():
    with pytest.raises(UserError, match=r"--seq-length 65536, shorter texts: .* GiB"):
        fit(job("llama-3.3-70b", seq_length=131_072))
    with pytest.raises(UserError, match=r"--micro-batch-tokens \d+, shorter rows"):
        fit(job("phi-4", 8, micro_batch_tokens=4_000_000))


def test_no_measure_of_that_name():
    with pytest.raises(UserError, match="--measures is 'sleep', expected one of recompute"):
        fit(job("phi-4"), measures=["sleep"])


def test_the_command(ranks, capsys):
    """A number of GPUs is spelled in two ways, and the flags can be pasted."""
    parser = make_parser("plan")[1]
    for text in ("8", "8-gpus"):
        assert parser.parse_args(["--model", "phi-4", "--fit", text]).fit == 8
    for words in (["--fit", "8-nodes"], ["--fit", "0"], ["--fit", "8", "--gpus", "8"], []):
        with pytest.raises(SystemExit):
            parser.parse_args(["--model", "phi-4", *words])
    argv = ["--model", "llama-3.3-70b", "--fit", "8-gpus"]
    ranks(1, "support.tools:run_tool", "plan_run", argv)
    lines = ranks.logs[0].splitlines()
    assert any(line.startswith("optimizer on the host: 98.6 GiB less, 9.2 hours") for line in lines)
    assert lines[-2] == "infifpo train ... \\"
    assert lines[-1].split() == list(fit(job("llama-3.3-70b")).flags)


def test_a_second_moment_in_bfloat16_stands_still():
    """Why it is not taken by itself: nothing is left of Megatron's default decay."""
    moments = torch.logspace(-20, 2, 200).bfloat16()
    assert torch.equal((moments.float() * 0.999).bfloat16(), moments)
    assert (moments.float() * 0.95).bfloat16().lt(moments).all()
