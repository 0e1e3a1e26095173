"""How often a real training step makes the host wait for the device, by place.

Waiting costs most in a micro-batch: the GPU runs dry while the host catches up. What is left is
once a step, most of it Megatron's: see `STEP`.
"""

import collections

import pytest
import torch

from megatron_infifpo.gpu_check.host_waits import counted
from support import te_training as te_jobs

STEPS = 2
# Most a step, of any number of rows. A constant: Python numbers, copied to the device.
STEP = {
    # The search for NaN log-probs: one copy; then what is on the host is asked for names.
    "wait step.check": 3,
    # Gradient norm, whether the step was skipped, whether the loss is NaN: Megatron's.
    "wait common_utils.reduce_max_stat_across_model_parallel_group": 2,
    "constant common_utils.reduce_max_stat_across_model_parallel_group": 1,
    "wait common_utils.logical_and_across_model_parallel_group": 1,
    "constant common_utils.logical_and_across_model_parallel_group": 1,
    "wait rerun_state_machine.validate_result": 2,
    "wait rerun_state_machine._reduce_any": 1,
    "constant rerun_state_machine._reduce_any": 1,
    # Once a run.
    "wait optimizer.has_grad_norm_group": 1,
    "constant optimizer.has_grad_norm_group": 1,
}
# Megatron's log line, every --log-interval steps: one wait a metric.
LOG_WAITS, LOG_CONSTANTS = 32, 60


MISTAKES = """
def wait(x):
    x.sum().item()
    x.cpu()
    x[x > 0]
    bool(x.any())
    x.tolist()
    x.repeat_interleave(x.long())
def constant(x):
    x.new_tensor([1.0])
    torch.tensor(1.0, device=x.device)
"""


def test_counter():
    """It sees what waits, and names the function of Megatron that it is in."""
    made: dict = {"torch": torch}
    exec(compile(MISTAKES, "/site-packages/megatron/made_up.py", "exec"), made)
    counts: collections.Counter[str] = collections.Counter()
    for name in ("wait", "constant"):
        counted(counts, made[name])(torch.ones(3))
    assert counts == {"wait made_up.wait": 6, "constant made_up.constant": 2}


def test_scored_rows_are_pinned(monkeypatch):
    """Else each copy of a row to the GPU waits for all rows before it."""
    from megatron_infifpo.engine import packed

    log: list[tuple[str, int]] = []

    def schedule(forward_step_func, data_iterator, model, num_microbatches, **_):
        return [forward_step_func(data_iterator, model[0])[0] for _ in range(num_microbatches)]

    def note(what: str):
        def noted(row):
            log.append((what, row["n"]))
            return row

        return noted

    state = packed.parallel_state
    monkeypatch.setattr(state, "get_context_parallel_world_size", lambda: 1)
    monkeypatch.setattr(state, "get_context_parallel_rank", lambda: 0)
    monkeypatch.setattr(packed, "get_schedule", lambda: schedule)
    monkeypatch.setattr(packed, "cut", lambda row, *_: row)
    monkeypatch.setattr(packed, "run_packed", lambda model, row, _: torch.tensor(row["n"]))
    monkeypatch.setattr(packed, "pin", note("pinned"))
    monkeypatch.setattr(packed, "to_device", note("copied"))
    found = packed.score_rows([torch.nn.Identity()], [{"n": 1}, {"n": 2}], 10)
    assert [int(x) for x in found] == [1, 2]
    # One after the other: a row is pinned while the GPU computes the one before.
    assert log == [("pinned", 1), ("copied", 1), ("pinned", 2), ("copied", 2)]


@pytest.fixture(scope="module")
def jobs(newest_te_ranks, tmp_path_factory):
    made = {}

    def get(family: str) -> str:
        if family not in made:
            made[family] = str(tmp_path_factory.mktemp(f"waits-{family}"))
            newest_te_ranks(1, "support.te_training:make_job", made[family], family)
        return made[family]

    return get


def waits_of(ranks, job: str, kind: str, pairs: int) -> tuple[dict[str, int], dict[str, int]]:
    """Waits of two steps of eight pairs, so many a row, and those of their log lines."""
    flags = ["--bf16", "--use-distributed-optimizer", "--train-iters", str(STEPS)]
    argv = te_jobs.flags(job, *flags, "--micro-batch-size", str(pairs))
    (found,) = ranks(1, "support.te_training:count_waits", argv, kind)
    return found["train_step"], found["training_log"]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["local", "te"])
def test_none_in_a_micro_batch(newest_te_ranks, jobs, family, kind):
    step, log = waits_of(newest_te_ranks, jobs(family), kind, pairs=1)
    assert waits_of(newest_te_ranks, jobs(family), kind, pairs=4)[0] == step  # 8 rows a step, and 2
    assert step.keys() <= STEP.keys()
    assert {place: count for place, count in step.items() if count > STEP[place] * STEPS} == {}
    for what, most in (("wait", LOG_WAITS), ("constant", LOG_CONSTANTS)):
        assert sum(n for place, n in log.items() if place.startswith(what)) <= most * STEPS


@pytest.mark.parametrize("method", ["fuserlhf", "pad", "fusellm", "infifusion", "infifpo-lora"])
def test_other_methods(setup, newest_te_ranks, method):
    """Lists, soft targets and adapters wait for no more, and all metrics take one reduction."""
    name, adapters, _ = method.partition("-lora")
    flags = ["--bf16", "--train-iters", str(STEPS), "--global-batch-size", "8"]
    flags += ["--micro-batch-size", "1", *(["--lora-rank", "4"] if adapters else [])]
    argv = setup.method_flags(name, *flags)
    (found,) = newest_te_ranks(1, "support.te_training:count_waits", argv, "te")
    step = found["train_step"]
    assert step.keys() <= STEP.keys()
    assert {place: count for place, count in step.items() if count > STEP[place] * STEPS} == {}
    assert found["reductions"]["schedule.reduced"] == STEPS
    assert "training.train_step" not in found["reductions"]
