"""Layouts for the GPUs that are there: of training by the planner, of scoring by size."""

import math
import os
import subprocess
import sys
from functools import cache
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.families import megatron_args
from megatron_infifpo.families.architecture import read_hf_config
from megatron_infifpo.planning.fit import fit
from megatron_infifpo.planning.job import PlanningJob
from megatron_infifpo.planning.layout import Layout as Spread
from megatron_infifpo.planning.plan import GIB
from megatron_infifpo.run.checks import name_of
from megatron_infifpo.run.names import PIVOT
from megatron_infifpo.run.plan import Layouts
from megatron_infifpo.run.schema import Layout, Run, Training

ROOM = 0.6  # of a GPU for weights in scoring: the rest is for rows and the head


@cache
def count_gpus() -> int:
    """GPUs that a command sees; asked in a process of its own, so that this one holds none."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    asked = [sys.executable, "-W", "ignore", "-c", code]
    try:
        return int(subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout)
    except (subprocess.CalledProcessError, ValueError):
        return 0


def ranks_of(run: Run) -> int:
    """Ranks of a node: one a GPU, or one on a CPU where nothing is said."""
    return run.cluster.ranks or count_gpus() or 1


def on_gpus(run: Run) -> bool:
    """Whether its stages have GPUs: jobs of SLURM ask for them."""
    return run.cluster.executor == "slurm" or count_gpus() > 0


def choose_layouts(run: Run) -> Layouts:
    """Choose what run.yaml leaves open.

    Raises:
        UserError: nothing fits; says what would.
    """
    ranks, gpus = ranks_of(run), on_gpus(run)
    models = {PIVOT: run.pivot.model} | {each.name: each.model for each in run.sources}
    given = {PIVOT: run.pivot.layout} | {each.name: each.layout for each in run.sources}
    backends = {PIVOT: "megatron"} | {each.name: each.backend for each in run.sources}
    scoring = {
        name: given[name] or _scoring(run, model, ranks if gpus else 1)
        for name, model in models.items()
        if backends[name] == "megatron"
    }
    training = {name_of(one): _training(run, one, ranks * run.cluster.nodes) for one in run.train}
    return Layouts(training, scoring)


def _scoring(run: Run, model: str, ranks: int) -> Layout:
    """The fewest ranks that hold a model, inside of a node; all others have rows of their own."""
    if ranks == 1:
        return Layout()
    sizes = PlanningJob(model=_architecture(model), gpus=1).plan.sizes
    size = 2 if run.precision == "bf16" else 4
    room = ROOM * run.cluster.gpu_memory * GIB
    experts = sizes.experts.count if sizes.experts else 1
    for tensor in (n for n in _tensor_sizes(model) if ranks % n == 0):
        expert = math.gcd(experts, tensor)  # over the ranks of a row, which are those
        spread = Spread(tensor=tensor, pipeline=1, data=1, expert=expert)
        if sum(sizes.stage(spread, 0).on_rank(spread)) * size <= room:
            return Layout(tensor=tensor, expert=expert)
    return Layout(tensor=tensor, pipeline=ranks // tensor, expert=expert)


def _training(run: Run, training: Training, gpus: int) -> tuple[str, ...]:
    """Flags of a training's layout: the given one, or the planner's fastest way that fits."""
    rows = ("--micro-batch-tokens", str(training.micro_batch_tokens))
    if training.layout is not None or not on_gpus(run):
        return (*_flags(training.layout or Layout()), *rows)
    plan = PlanningJob(
        model=_architecture(run.pivot.model), gpus=gpus, gpus_per_node=ranks_of(run),
        gpu_memory=run.cluster.gpu_memory, precision=run.precision,
        micro_batch_tokens=training.micro_batch_tokens,
        global_batch_size=training.global_batch_size, lora_rank=training.lora_rank,
    )  # fmt: skip
    try:
        return fit(plan).chosen_flags
    except UserError as error:
        raise UserError(
            f"training {name_of(training)}: {error}\n(infifpo plan --model {run.pivot.model} "
            f"--fit {gpus} says so, too; or give train a layout and flags)"
        ) from None


def _flags(layout: Layout) -> tuple[str, ...]:
    sizes = {"tensor-model": layout.tensor, "pipeline-model": layout.pipeline}
    sizes |= {"context": layout.context, "expert-model": layout.expert}
    words = [w for name, n in sizes.items() if n > 1 for w in (f"--{name}-parallel-size", str(n))]
    return (*words, *(["--sequence-parallel"] if layout.tensor > 1 else []))


def _architecture(model: str) -> Any:
    return megatron_args(read_hf_config(model))


def _tensor_sizes(model: str) -> list[int]:
    from megatron_infifpo.families import tensor_parallel_sizes

    return sorted(tensor_parallel_sizes(_architecture(model)))


def threads_of(run: Run) -> int:
    """Threads of a rank on a CPU: cores, shared among all that run at once."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // (ranks_of(run) * run.cluster.at_once))
