"""The demo's data, models and settings, up to the scored pairs that training starts from."""

from dataclasses import dataclass
from pathlib import Path

from gemma import save_gemma
from job import Job
from pivot import save_pivot
from specialists import train_all

HERE = Path(__file__).resolve().parent
RECORDS = {split: HERE / "data" / f"{split}.jsonl" for split in ("train", "heldout")}
# Sources that take part in some domains only; the others in all.
DOMAINS = {"coder": ["code"]}
# The published learning rate of 1e-7 is for 14B parameters and 587 steps; this is 135M and 12.
TRAIN = ["--lr", "5e-5", "--min-lr", "5e-6", "--lr-decay-style", "cosine"]
TRAIN += ["--lr-warmup-fraction", "0.1", "--clip-grad", "1.0", "--weight-decay", "0.0"]
TRAIN += ["--global-batch-size", "8", "--micro-batch-size", "1"]
TRAIN += ["--seq-length", "1024", "--log-interval", "1", "--seed", "1234"]


@dataclass(frozen=True)
class Prepared:
    """What the demo's first stages leave.

    `models` are the sources, name -> Hugging Face folder, with the flags that score them.
    """

    hf_pivot: Path
    pivot: Path
    models: dict[str, tuple[Path, list[str]]]


def models(job: Job, *, gemma: bool) -> Prepared:
    """Get the pivot, train the specialists, import the pivot."""
    job.stage("get the pivot, SmolLM2-135M-Instruct, and train two specialists as its sources")
    hf_pivot = save_pivot(job.folder / "pivot-hf")
    trained = train_all(job.folder / "sources-hf")
    sources = {name: (model, job.tensor) for name, model in trained.items()}
    if gemma:
        folder = save_gemma(job.folder / "gemma-hf")
        sources["gemma"] = (folder, ["--backend", "transformers"])
    job.stage("import the pivot: Hugging Face -> Megatron")
    return Prepared(hf_pivot, job.import_pivot(hf_pivot), sources)


def score_sources(job: Job, prepared: Prepared, splits: tuple[str, ...]) -> None:
    """Score splits under every source."""
    for split in splits:
        for name, (model, flags) in prepared.models.items():
            job.score(split, name, model, *flags)


def prepare(job: Job, *, gemma: bool) -> Prepared:
    """Run everything that comes before training, on both splits."""
    prepared = models(job, gemma=gemma)
    job.stage("tokenize the preference pairs for the pivot")
    for split in RECORDS:
        job.tokenize(split, prepared.hf_pivot)
    job.stage(f"score every pair: the pivot at PP {job.ranks}, the specialists at TP {job.ranks}")
    for split in RECORDS:
        job.score(split, "pivot", prepared.pivot, *job.pipeline)
    score_sources(job, prepared, tuple(RECORDS))
    return prepared
