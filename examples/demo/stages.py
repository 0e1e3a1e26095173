"""The paper's two stages on the demo's data: what each makes is what the next ones begin with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from island import write_records
from job import Job
from pivot import save_pivot
from specialists import train_all

# The published rates of 1e-6 and 1e-7 are for 14B parameters and hundreds of steps of 128.
TRAIN = ["--lr", "1e-4", "--min-lr", "1e-5", "--lr-decay-style", "cosine"]
TRAIN += ["--lr-warmup-fraction", "0.1", "--clip-grad", "1.0", "--weight-decay", "0.0"]
TRAIN += ["--global-batch-size", "8", "--micro-batch-size", "4", "--seq-length", "256"]
TRAIN += ["--log-interval", "1", "--seed", "1234", "--no-save-optim"]
# The halves of the training records.
HALVES = ("sft", "preference")


@dataclass(frozen=True)
class Prepared:
    """The models of a job: the pivot, converted too; sources, name -> folder, layout of scoring."""

    hf_pivot: Path
    pivot: Path
    models: dict[str, tuple[Path, str]]


def models(job: Job) -> Prepared:
    """Get the pivot, train the specialists, import the pivot."""
    job.stage("get the pivot, SmolLM2-135M-Instruct, and train two specialists as its sources")
    hf_pivot = save_pivot(job.folder / "pivot-hf")
    sources = train_all(job.folder / "sources-hf")
    job.stage("import the pivot: Hugging Face -> Megatron")
    pivot = job.import_pivot(hf_pivot)
    return Prepared(hf_pivot, pivot, {name: (hf, "tensor") for name, hf in sources.items()})


def new_job(folder: Path, heldout: Path) -> Job:
    """A job on both halves of its records, and on held-out ones."""
    folder = folder.resolve()
    return Job(folder, {half: folder / f"{half}.jsonl" for half in HALVES} | {"heldout": heldout})


def halve(job: Job, records: Path, tokenizer: Path) -> None:
    """Split records by prompt, and tokenize all for the pivot."""
    job.stage("split the records by prompt, tokenize them for the pivot")
    parts = [word for half in HALVES for word in (f"--{half}", job.records[half])]
    job.once("split", "split", "--input", records, *parts)
    job.side_by_side(
        *(partial(Job.tokenize, split=split, tokenizer=tokenizer) for split in job.records)
    )


def first_stage(job: Job, pivot: Path, *flags: object) -> Path:
    """SFT on one half; the result is the initial pivot of all that follows."""
    job.stage(f"first stage: SFT on the chosen responses of one half, PP {job.ranks}")
    return job.train("sft", "sft", pivot, "--method", "sft", *flags)


def scorings(
    split: str, start: Path, sources: dict[str, tuple[Path, str]]
) -> list[Callable[[Job], None]]:
    """Works for `Job.side_by_side`: score a split under the initial pivot and every source."""
    models = {"sft": (start, "pipeline"), **sources}
    return [
        partial(Job.score, split=split, name=name, model=model, layout=layout)
        for name, (model, layout) in models.items()
    ]


def prepare(folder: Path) -> tuple[Job, Prepared, Path]:
    """Run everything up to the pairs that preference optimization starts from, all scored.

    Returns the job, its models, and the SFT result.
    """
    records = write_records(folder.resolve() / "records")
    job = new_job(folder, records["heldout"])
    prepared = models(job)
    halve(job, records["train"], prepared.hf_pivot)
    start = first_stage(job, prepared.pivot, *TRAIN)
    job.stage("score the other half of the pairs: the SFT result and the specialists")
    job.side_by_side(*scorings("preference", start, prepared.models))
    return job, prepared, start
