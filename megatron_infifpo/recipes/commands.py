"""The command line of every stage of a run: sbatch scripts and nemo-run tasks both start these.

Everything of a run lies in one folder, and each stage finds there what others left:

    RUN/data/sft.jsonl, preference.jsonl     records (infifpo split)
    RUN/data/sft.*, preference.*             token datasets
    RUN/sources.yaml                         the sources, and how each is scored
    RUN/logprobs/NAME.*                      log-prob datasets
    RUN/pivot, RUN/sft, RUN/METHOD           checkpoints; RUN/METHOD-hf is exported

Defaults are the paper's run: Phi-4, on two nodes of eight GPUs.
"""

import functools
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.references.sources import read_sources
from megatron_infifpo.scoring.job import BACKENDS

RUN = "runs/phi4"
PIVOT = "models/phi-4"
PROGRAM = "megatron_infifpo"
LAYOUT = ("tensor-model-parallel-size", "pipeline-model-parallel-size")
BASELINES = ("dpo", "ipo", "wrpo", "infifpo-ipo", "infifpo-wrpo")


@dataclass(frozen=True)
class Job:
    """One stage of a run.

    Attributes:
        name: of the stage, for logs.
        arguments: what follows `infifpo` on the command line.
        every_rank: whether all ranks run it together, else one process does.
    """

    name: str
    arguments: tuple[str, ...]
    every_rank: bool = False

    def __str__(self) -> str:
        """As a shell takes it."""
        return shlex.join(("infifpo", *self.arguments))

    @property
    def python_words(self) -> tuple[str, ...]:
        """What follows `python`, to start it with.

        As a module, not by the installed script: torchrun, srun and containers start it with the
        Python that they have, whatever is on PATH, and from a checkout that is not installed.
        """
        return ("-m", PROGRAM, *self.arguments)


def split_words(text: str, name: str) -> list[str]:
    """Split what a value holds into words, as a shell does.

    Raises:
        UserError: a quote is not closed; `name` says where.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{name}={text}: {error}, expected words as a shell reads them: quote what has spaces, "
            "and close every quote"
        ) from None


def flag_words(name: str, value: Any) -> list[str]:
    """The words of a flag on a command line: true alone, lists as several, mappings as JSON."""
    if value is False:
        return []
    if value is True:
        return [f"--{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
    # A word that begins like a flag is none after an equals sign.
    return [f"--{name}={text}"] if text.startswith("-") else [f"--{name}", text]


def scoring_words(usual: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Flags of scoring a model: the usual ones, but where the model has its own.

    Args:
        usual: values of flags by name, `backend` among them.
        own: the same of this model; a backend without a layout has one only here.
    """
    options = {**usual, **own}
    backend = BACKENDS.get(str(options["backend"]))
    if backend and "pipeline_parallel" not in backend.takes:
        options = {k: v for k, v in options.items() if k not in LAYOUT or k in own}
    return [word for option, value in options.items() for word in flag_words(option, value)]


def convert(run: str = RUN, hf: str = PIVOT, dtype: str = "bf16") -> Job:
    """Import the pivot from Hugging Face to RUN/pivot.

    Args:
        run: folder of the run.
        hf: the pivot's Hugging Face folder.
        dtype: of the weights, bf16 or fp32.
    """
    save = f"{run}/pivot"
    flags = ("import", "--hf", hf, "--save", save, "--dtype", dtype)
    return Job("convert", flags)


def prepare(run: str = RUN, hf: str = PIVOT, split: str = "preference", flags: str = "") -> Job:
    """Tokenize one half of the records for the pivot.

    Args:
        run: folder of the run.
        hf: the pivot's Hugging Face folder, for its tokenizer and chat template.
        split: `sft` or `preference`; reads RUN/data/SPLIT.jsonl.
        flags: further ones of `infifpo prepare`.
    """
    prefix = f"{run}/data/{split}"
    given = ("--input", f"{prefix}.jsonl", "--tokenizer", hf, "--output", prefix)
    more = split_words(flags, "flags")
    return Job(f"prepare-{split}", ("prepare", *given, *more))


def score(
    run: str = RUN,
    index: int = 0,
    initial: str = "sft",
    tensor: int = 2,
    pipeline: int = 1,
    bf16: bool = True,
    flags: str = "",
) -> Job:
    """Score the preference pairs under the initial pivot, or under one of RUN/sources.yaml.

    Args:
        run: folder of the run.
        index: 0 for the initial pivot, i for the i-th source, as an array task counts.
        initial: checkpoint in RUN that preference training starts from.
        tensor: tensor-parallel size, where the source's `score` does not say another.
        pipeline: pipeline-parallel size, likewise.
        bf16: weights in bfloat16, else float32.
        flags: further ones of `infifpo score`.

    Raises:
        UserError: there is no such source, or it does not say what model it is.
    """
    config = read_sources(f"{run}/sources.yaml")
    usual: dict[str, Any] = {"bf16": bf16, "backend": "megatron"}
    usual |= dict(zip(LAYOUT, (tensor, pipeline), strict=True))
    domains: tuple[str, ...] = ()
    if index == 0:
        name, output = "initial", config.initial
        own: dict[str, Any] = {"model": f"{run}/{initial}"}
    elif 0 < index <= len(config.sources):
        source = config.sources[index - 1]
        name, output, domains = source.name, source.logprobs, source.domains or ()
        own = source.score
        if "model" not in own:
            raise UserError(
                f"{config.path}: source {name!r} does not say which model it is, expected for "
                "example: score: {model: models/qwen}"
            )
    else:
        raise UserError(
            f"{config.path} has {len(config.sources)} sources, but index is {index}: expected 0 "
            "(the initial pivot) to their number"
        )
    arguments = ["score", *scoring_words(usual, own)]
    arguments += ["--name", name, "--input", f"{run}/data/preference.jsonl", "--output", output]
    if domains:
        arguments += ["--domains", *domains]
    return Job(f"score-{name}", (*arguments, *split_words(flags, "flags")), every_rank=True)


def infifpo(
    run: str = RUN,
    method: str = "infifpo",
    beta: float | None = None,
    initial: str = "sft",
    epochs: int = 1,
    lr: float = 1e-7,
    tensor: int = 2,
    pipeline: int = 2,
    global_batch_size: int = 128,
    micro_batch_tokens: int = 8192,
    seq_length: int = 4096,
    save_interval: int = 100,
    bf16: bool = True,
    flags: str = "",
) -> Job:
    """Train by preference optimization on RUN/data/preference, to RUN/METHOD.

    Args:
        run: folder of the run.
        method: any of `--method`: infifpo, dpo, ipo, wrpo, fpo, infifpo-ipo, infifpo-wrpo, ...
        beta: of the loss; the method's published one where it is None.
        initial: checkpoint in RUN to start from, the one that was scored as the initial pivot.
        epochs: passes over the pairs.
        lr: highest learning rate; cosine, after 10 % of warm-up.
        tensor: tensor-parallel size, with sequence parallelism above 1.
        pipeline: pipeline-parallel size; the ranks that remain are data-parallel.
        global_batch_size: pairs of a step.
        micro_batch_tokens: at most, of a packed row.
        seq_length: at most, of a prompt with one response; longer pairs are left out.
        save_interval: steps from one checkpoint to the next.
        bf16: train in bfloat16, else float32.
        flags: further ones of `infifpo train`, Megatron's included.
    """
    from megatron_infifpo.methods import METHODS  # here: it imports torch

    sft = method in METHODS and METHODS[method].reference is None
    half = "sft" if sft else "preference"
    arguments = ["train", "--method", method]
    arguments += ["--preference-data", f"{run}/data/{half}"]
    if not sft:
        arguments += ["--preference-sources", f"{run}/sources.yaml"]
    if beta is not None:
        arguments += ["--beta", str(beta)]
    arguments += ["--tensor-model-parallel-size", str(tensor)]
    arguments += ["--pipeline-model-parallel-size", str(pipeline), "--use-distributed-optimizer"]
    arguments += ["--overlap-grad-reduce", "--overlap-param-gather"]
    arguments += ["--sequence-parallel"] if tensor > 1 else []
    arguments += ["--bf16"] if bf16 else []
    arguments += ["--preference-epochs", str(epochs), "--lr", str(lr)]
    arguments += ["--lr-decay-style", "cosine", "--lr-warmup-fraction", "0.1"]
    arguments += ["--global-batch-size", str(global_batch_size)]
    arguments += ["--micro-batch-tokens", str(micro_batch_tokens), "--seq-length", str(seq_length)]
    save = f"{run}/{method}"
    arguments += ["--pretrained-checkpoint", f"{run}/{initial}", "--save", save]
    arguments += ["--save-interval", str(save_interval), "--log-interval", "1"]
    arguments += ["--tensorboard-dir", f"{save}/tensorboard"]
    # Megatron saves and exits at SIGTERM, which is how clusters preempt.
    arguments += ["--exit-signal-handler", *split_words(flags, "flags")]
    return Job(method, tuple(arguments), every_rank=True)


sft = functools.partial(infifpo, method="sft", initial="pivot", epochs=3, lr=1e-6)
sft.__doc__ = """Train RUN/pivot on the chosen responses of RUN/data/sft, to RUN/sft.

Options as of `infifpo`, with other defaults.
"""


def export(run: str = RUN, method: str = "infifpo") -> Job:
    """Export RUN/METHOD to Hugging Face, to RUN/METHOD-hf.

    Args:
        run: folder of the run.
        method: checkpoint in RUN, such as infifpo or sft.
    """
    flags = ("export", "--load", f"{run}/{method}", "--save", f"{run}/{method}-hf")
    return Job(f"export-{method}", flags)


STAGES: dict[str, Callable[..., Job]] = {
    "convert": convert,
    "prepare": prepare,
    "score": score,
    "sft": sft,
    "infifpo": infifpo,
    "export": export,
}
