"""The command line of every stage of a run: sbatch scripts and nemo-run tasks both start these.

Everything of a run lies in one folder, and each stage finds there what others left:

    RUN/data/sft.jsonl, preference.jsonl     records (infifpo split)
    RUN/data/sft.*, preference.*             token datasets
    RUN/sources.yaml                         the sources, and how each is scored
    RUN/logprobs/NAME.*                      log-prob datasets
    RUN/pivot, RUN/sft, RUN/METHOD           checkpoints; RUN/METHOD-hf is exported

Token-level fusion, and SFT that weighs pairs, read the SFT half with log-probs of its own:

    RUN/fusion/sources.yaml                  a link to ../sources.yaml: the same sources, whose
    RUN/fusion/logprobs/NAME.*               log-prob data sets lie beside it
    RUN/fusion/METHOD.*                      soft targets of all sources, of the i-th one alone
                                             METHOD-NAME, as RUN/METHOD-NAME is trained on them

Defaults are the paper's run: Phi-4, on two nodes of eight GPUs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from megatron_infifpo.errors import UserError
from megatron_infifpo.recipes.fusion import TOP_K, fuse, merge, of_source, source_at, token_sources
from megatron_infifpo.recipes.job import LAYOUT, PIVOT, RUN, Job, scoring_words, split_words
from megatron_infifpo.references.sources import read_sources

BASELINES = ("dpo", "ipo", "wrpo", "infifpo-ipo", "infifpo-wrpo")


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
    split: str = "preference",
    initial: str | None = None,
    top_k: int | None = None,
    tensor: int = 2,
    pipeline: int = 1,
    context: int = 1,
    expert: int = 1,
    bf16: bool = True,
    flags: str = "",
) -> Job:
    """Score one half of the records under the initial pivot, or under one of RUN/sources.yaml.

    Args:
        run: folder of the run.
        index: 0 for the initial pivot, i for the i-th source, as an array task counts.
        split: `preference`, or `sft` for token-level fusion, of RUN/fusion/sources.yaml.
        initial: checkpoint in RUN that training on that half starts from: sft, or pivot for `sft`.
        top_k: most probable tokens that are kept of the chosen responses: none, or 16 for `sft`.
        tensor: tensor-parallel size, where the source's `score` does not say another.
        pipeline, context: pipeline- and context-parallel sizes, likewise.
        expert: expert-parallel size, likewise: of models that all have experts.
        bf16: weights in bfloat16, else float32.
        flags: further ones of `infifpo score`.

    Raises:
        UserError: there is no such source, or it does not say what model it is.
    """
    tokens = split == "sft"
    config = token_sources(run) if tokens else read_sources(f"{run}/sources.yaml")
    usual: dict[str, Any] = {"bf16": bf16, "backend": "megatron"}
    usual |= dict(zip(LAYOUT, (tensor, pipeline, context, expert), strict=True))
    for flag, size in zip(LAYOUT[2:], (context, expert), strict=True):
        if size == 1:
            del usual[flag]
    if top_k or tokens:
        usual |= {"top-k": top_k or TOP_K, "top-k-responses": "chosen"}
    domains: tuple[str, ...] = ()
    if index == 0:
        name, output = "initial", config.initial
        own: dict[str, Any] = {"model": f"{run}/{initial or ('pivot' if tokens else 'sft')}"}
    else:
        source = source_at(config, index, "0 (the initial pivot)")
        name, output, domains = source.name, source.logprobs, source.domains or ()
        own = source.score
        if "model" not in own:
            raise UserError(
                f"{config.path}: source {name!r} does not say which model it is, expected for "
                "example: score: {model: models/qwen}"
            )
    arguments = ["score", *scoring_words(usual, own)]
    arguments += ["--name", name, "--input", f"{run}/data/{split}.jsonl", "--output", output]
    if domains:
        arguments += ["--domains", *domains]
    title = f"score-sft-{name}" if tokens else f"score-{name}"
    return Job(title, (*arguments, *split_words(flags, "flags")), every_rank=True)


def infifpo(
    run: str = RUN,
    method: str = "infifpo",
    index: int = 0,
    beta: float | None = None,
    initial: str = "sft",
    epochs: int = 1,
    lr: float = 1e-7,
    tensor: int = 2,
    pipeline: int = 2,
    context: int = 1,
    expert: int = 1,
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
        method: any of `--method`: infifpo, dpo, ipo, wrpo, fpo, infifpo-ipo, infifpo-wrpo, ...;
            those of tokens (fusellm, ...) as options of `sft`.
        index: i for RUN/fusion/METHOD-NAME, soft targets of the i-th source alone; 0: of all.
        beta: of the loss; the method's published one where it is None.
        initial: checkpoint in RUN to start from, the one that was scored as the initial pivot.
        epochs: passes over the pairs.
        lr: highest learning rate; cosine, after 10 % of warm-up.
        tensor: tensor-parallel size, with sequence parallelism above 1.
        pipeline: pipeline-parallel size; the ranks that remain are data-parallel.
        context: context-parallel size, for long texts: ranks that share a row.
        expert: expert-parallel size, of a model with experts.
        global_batch_size: pairs of a step.
        micro_batch_tokens: at most, of a packed row.
        seq_length: at most, of a prompt with one response; longer pairs are left out.
        save_interval: steps from one checkpoint to the next.
        bf16: train in bfloat16, else float32.
        flags: further ones of `infifpo train`, Megatron's included.
    """
    given = split_words(flags, "flags")
    name, data = _data(run, method, index, given)
    layout = ["--tensor-model-parallel-size", str(tensor)]
    layout += ["--pipeline-model-parallel-size", str(pipeline)]
    layout += ["--context-parallel-size", str(context)] if context > 1 else []
    layout += ["--expert-model-parallel-size", str(expert)] if expert > 1 else []
    layout += ["--sequence-parallel"] if tensor > 1 else []
    layout += ["--micro-batch-tokens", str(micro_batch_tokens)]
    arguments = training_words(
        method, data, f"{run}/{initial}", f"{run}/{name}", layout=layout, beta=beta, bf16=bf16,
        epochs=epochs, lr=lr, global_batch_size=global_batch_size, seq_length=seq_length,
        save_interval=save_interval,
    )  # fmt: skip
    return Job(name, ("train", *arguments, *given), every_rank=True)


def training_words(
    method: str,
    data: Sequence[str],
    start: str,
    save: str,
    *,
    layout: Sequence[str],
    beta: float | None,
    bf16: bool,
    epochs: int,
    lr: float,
    global_batch_size: int,
    seq_length: int,
    save_interval: int,
) -> list[str]:
    """Words after `infifpo train`.

    Args:
        method, beta, epochs, lr, global_batch_size, seq_length, save_interval, bf16: see `infifpo`.
        data: flags of what is trained on.
        start: checkpoint, or Hugging Face folder, that it starts from.
        save: folder of its own.
        layout: flags of how ranks share the model, and of the rows.
    """
    words = ["--method", method, *data]
    words += ["--beta", str(beta)] if beta is not None else []
    words += [*layout, "--use-distributed-optimizer"]
    words += ["--overlap-grad-reduce", "--overlap-param-gather"]
    words += ["--bf16"] if bf16 else []
    words += ["--preference-epochs", str(epochs), "--lr", str(lr), "--lr-decay-style", "cosine"]
    words += ["--lr-warmup-fraction", "0.1", "--global-batch-size", str(global_batch_size)]
    words += ["--seq-length", str(seq_length), "--pretrained-checkpoint", start, "--save", save]
    words += ["--save-interval", str(save_interval), "--log-interval", "1"]
    words += ["--tensorboard-dir", f"{save}/tensorboard"]
    # Megatron saves and exits at SIGTERM, which is how clusters preempt.
    return [*words, "--exit-signal-handler"]


def _data(run: str, method: str, index: int, given: Sequence[str]) -> tuple[str, list[str]]:
    """What a method is called in the folder of the run, and the flags of what it reads there.

    Args:
        run, method, index: see `infifpo`.
        given: further words of training.
    """
    from megatron_infifpo.methods import METHODS  # here: it imports torch

    preset = METHODS.get(method)
    targets = preset is not None and preset.soft_targets
    if index and not targets:
        raise UserError(f"index={index} has no effect with method={method}: it fuses no tokens")
    name = of_source(run, method, index)
    if targets:
        more = ["--soft-targets", f"{run}/fusion/{name}"]
        return name, ["--preference-data", f"{run}/data/sft", *more]
    if preset is not None and preset.reference is None:
        weighs = any(word.partition("=")[0] == "--pair-weights" for word in given)
        more = ["--preference-sources", f"{run}/fusion/sources.yaml"] if weighs else []
        return name, ["--preference-data", f"{run}/data/sft", *more]
    more = ["--preference-sources", f"{run}/sources.yaml"]
    return name, ["--preference-data", f"{run}/data/preference", *more]


sft = functools.partial(infifpo, method="sft", initial="pivot", epochs=3, lr=1e-6)
sft.__doc__ = """Train RUN/pivot on the chosen responses of RUN/data/sft, to RUN/sft.

With `method=fusellm`, fusechat or infifusion also on the soft targets of RUN/fusion, to RUN/METHOD.
With `--pair-weights` among its flags, weighted by the log-probs that RUN/fusion/sources.yaml names.
Options as of `infifpo`, with other defaults.
"""


def export(run: str = RUN, method: str = "infifpo", index: int = 0) -> Job:
    """Export RUN/METHOD to Hugging Face, to RUN/METHOD-hf.

    Args:
        run: folder of the run.
        method: checkpoint in RUN, such as infifpo or sft.
        index: i for RUN/METHOD-NAME, trained on soft targets of the i-th source alone.
    """
    name = of_source(run, method, index)
    flags = ("export", "--load", f"{run}/{name}", "--save", f"{run}/{name}-hf")
    return Job(f"export-{name}", flags)


STAGES: dict[str, Callable[..., Job]] = {
    "convert": convert,
    "prepare": prepare,
    "score": score,
    "sft": sft,
    "infifpo": infifpo,
    "export": export,
    "fuse": fuse,
    "merge": merge,
}
