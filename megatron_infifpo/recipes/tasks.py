"""nemo-run tasks of every stage, and the experiment that is a whole run.

In a program of your own:

    import nemo_run
    from megatron_infifpo.recipes import tasks

    with nemo_run.Experiment("dpo") as experiment:
        experiment.add(tasks.infifpo(method="dpo"), executor=my_executor)
        experiment.run()
"""

import functools
import re
import shlex
from collections.abc import Callable
from typing import Any

import nemo_run as run

from megatron_infifpo.recipes import commands
from megatron_infifpo.recipes.commands import BASELINES
from megatron_infifpo.recipes.fusion import token_sources
from megatron_infifpo.recipes.job import PIVOT, PROGRAM, RUN, Job
from megatron_infifpo.references.sources import read_sources


class Words(run.Script):
    """A script that gets its words as they are, spaces and quotes in them too.

    nemo-run joins them for a shell without quoting them, except on this machine.
    """

    def to_command(self, *arguments: Any, is_local: bool = False, **options: Any) -> list[str]:
        """The command's words, quoted where a shell reads them."""
        words = super().to_command(*arguments, is_local=is_local, **options)
        return words if is_local else [shlex.quote(word) for word in words]


def task(job: Job) -> run.Script:
    """Make a job a nemo-run task."""
    return Words(path=PROGRAM, args=[*job.arguments], m=True, entrypoint="python")


def title(job: Job) -> str:
    """A job's name as nemo-run can have it: it becomes a folder, and a word of a shell."""
    return re.sub(r"[^\w.-]+", "-", job.name)


def _recipe(stage: Callable[..., Job]) -> Callable[..., run.Script]:
    @functools.wraps(stage)
    def recipe(*arguments: Any, **options: Any) -> run.Script:
        return task(stage(*arguments, **options))

    return recipe


convert = _recipe(commands.convert)
prepare = _recipe(commands.prepare)
score = _recipe(commands.score)
sft = _recipe(commands.sft)
infifpo = _recipe(commands.infifpo)
export = _recipe(commands.export)
fuse = _recipe(commands.fuse)
merge = _recipe(commands.merge)


def baselines(methods: tuple[str, ...] = BASELINES, **options: Any) -> dict[str, run.Script]:
    """Preference training by other methods, from the same checkpoint and data.

    Args:
        methods: names of `--method`.
        options: of `infifpo`, for all of them.
    """
    return {method: infifpo(method=method, **options) for method in methods}


def infifpo_pipeline(
    alone: Any, every_rank: Any, hf: str = PIVOT, **training: Any
) -> run.Experiment:
    """Build a whole run: convert, prepare, SFT, score everything, train, export.

    Args:
        alone: executor of stages that are one process.
        every_rank: executor of training and scoring.
        hf: the pivot's Hugging Face folder.
        training: options of `infifpo`. SFT has those that are not its own or the method's (`flags`
            goes to both), scoring the layout where a source does not say another.

    Returns:
        The experiment; call its `run()` or `dryrun()`.
    """
    return experiment_of("infifpo", stages(hf, training), alone, every_rank)


def fusion_pipeline(
    alone: Any, every_rank: Any, hf: str = PIVOT, **training: Any
) -> run.Experiment:
    """Build the three ways of token-level fusion: score the SFT half, fuse, train, export, merge.

    RUN/pivot and the tokens of the SFT half are there: of `convert` and `prepare split=sft`.

    Args:
        alone: executor of stages that are one process.
        every_rank: executor of training and scoring.
        hf: the pivot's Hugging Face folder.
        training: options of `sft`; scoring has the layout where a source does not say another.

    Returns:
        The experiment; call its `run()` or `dryrun()`.
    """
    return experiment_of("fusion", fusion_stages(hf, training), alone, every_rank)


def experiment_of(
    name: str, pipeline: list[tuple[Job, list[str]]], alone: Any, every_rank: Any
) -> run.Experiment:
    """Build an experiment of stages, each after those that it waits for."""
    experiment = run.Experiment(name)
    with experiment:
        made: dict[str, str] = {}
        for job, after in pipeline:
            made[job.name] = experiment.add(
                task(job),
                executor=(every_rank if job.every_rank else alone).clone(),
                name=title(job),
                dependencies=[made[name] for name in after],
            )
    return experiment


# Of a source, where its own `score` does not say another.
_SCORED_AS = ("tensor", "pipeline", "context", "bf16")


def stages(hf: str, training: dict[str, Any]) -> list[tuple[Job, list[str]]]:
    """List the stages of a whole run, each with the names of those that it waits for."""
    folder = {"run": training.get("run", RUN)}
    layout = folder | {k: training[k] for k in _SCORED_AS if k in training}
    own = ("method", "beta", "epochs", "lr")
    dtype = "bf16" if training.get("bf16", True) else "fp32"
    convert = commands.convert(**folder, hf=hf, dtype=dtype)
    halves = {half: commands.prepare(**folder, hf=hf, split=half) for half in ("sft", "preference")}
    sft = commands.sft(**{k: v for k, v in training.items() if k not in own})
    sources = read_sources(f"{folder['run']}/sources.yaml").sources
    scores = [commands.score(**layout, index=index) for index in range(len(sources) + 1)]
    train = commands.infifpo(**training)
    export = commands.export(**folder, method=train.name)
    first, *others = scores
    return [
        (convert, []),
        *((half, []) for half in halves.values()),
        (sft, [convert.name, halves["sft"].name]),
        (first, [sft.name]),
        *((score, []) for score in others),
        (train, [halves["preference"].name, *(score.name for score in scores)]),
        (export, [train.name]),
    ]


def fusion_stages(hf: str, training: dict[str, Any]) -> list[tuple[Job, list[str]]]:
    """List the stages of the three ways of token-level fusion, as `stages` does.

    FuseLLM and InfiFusion learn from all sources at once, FuseChat's models from one each.
    """
    folder = {"run": training.get("run", RUN)}
    layout = folder | {k: training[k] for k in _SCORED_AS if k in training}
    numbers = range(1 + len(token_sources(folder["run"]).sources))
    scores = [commands.score(**layout, split="sft", index=index) for index in numbers]
    found = [(job, list[str]()) for job in scores]
    ready = [job.name for job in scores]
    exported: list[str] = []
    ways = [("fusellm", 0), ("infifusion", 0), *(("fusechat", index) for index in numbers[1:])]
    for method, index in ways:
        fused = commands.fuse(**folder, method=method, index=index)
        trained = commands.sft(**training, method=method, index=index)
        export = commands.export(**folder, method=method, index=index)
        found += [(fused, ready), (trained, [fused.name]), (export, [trained.name])]
        exported += [export.name] * (index > 0)
    return [*found, (commands.merge(**folder, hf=hf), exported)]
