"""A tiny pivot, two sources and preference data, made once through the program's commands."""

from collections.abc import Sequence
from pathlib import Path

from megatron_infifpo.methods import METHODS
from support import tiny
from support.launcher import Ranks
from support.runs import BOTH
from support.soft_targets import write_soft_targets


class Setup:
    """Folders of a tiny preference-training job.

    Attributes:
        folder: of the data sets.
        hf: the pivot's Hugging Face folder.
        pivot: the pivot, imported.
        data: prefix of the token data set.
        records: what it was made of.
        lists: a job of the same models on lists of responses.
    """

    lists: "Setup"

    def __init__(self, folder: Path, models: Path):
        self.folder = folder
        self.hf = models / "hf"
        self.pivot = models / "pivot"
        self.data = folder / "train"
        self.records = folder / "train.jsonl"

    def sources(self, name: str, *entries: str) -> Path:
        """Write a sources.yaml of the given entries over the scored datasets."""
        path = self.folder / f"{name}.yaml"
        lines = "\n".join(f"  - {entry}" for entry in entries)
        path.write_text(f"initial: initial\nsources:\n{lines}\n")
        return path

    def flags(self, sources: Path, *more: str) -> list[str]:
        """Command line of a training run of three steps of eight pairs."""
        return [
            "--preference-data", str(self.data), "--preference-sources", str(sources),
            "--pretrained-checkpoint", str(self.pivot), "--train-iters", "3",
            "--global-batch-size", "8", "--micro-batch-size", "2", "--lr", "1e-3",
            "--lr-decay-style", "constant", "--seq-length", "256", "--log-interval", "1",
            "--use-distributed-optimizer", *more,
        ]  # fmt: skip

    def of(self, method: str) -> "Setup":
        """Return the job that a method can train on: of lists, or of pairs."""
        return self.lists if METHODS[method].responses is None else self

    def method_flags(self, method: str, *more: str, entries: Sequence[str] = BOTH) -> list[str]:
        """Command line of a run of a method, on what it can train on."""
        job = self.of(method)
        argv = job.flags(job.sources("both", *entries), "--method", method, *more)
        if METHODS[method].reference is None:
            position = argv.index("--preference-sources")
            del argv[position : position + 2]
        if METHODS[method].soft_targets and "--soft-targets" not in more:
            argv += ["--soft-targets", str(self.soft_targets(method))]
        return argv

    def soft_targets(self, method: str) -> Path:
        """Return what a method learns of tokens; made once."""
        prefix = self.folder / f"targets-{METHODS[method].objective}"
        if not prefix.with_name(f"{prefix.name}.json").exists():
            write_soft_targets(self.data, prefix, METHODS[method])
        return prefix


def make(folder: Path, ranks: Ranks) -> Setup:
    """Import the pivot, prepare pairs and lists, score both under the pivot and two sources."""
    job, lists = Setup(folder, folder), Setup(folder / "lists", folder)
    job.lists = lists
    lists.folder.mkdir(parents=True)
    tiny.save_model(job.hf, "llama", seed=1)
    tiny.write_records(job.records, 20)
    tiny.write_lists(lists.records, 20)
    convert = ["import", "--hf", str(job.hf), "--save", str(job.pivot)]
    ranks(1, "support.tools:run_tool", "convert_checkpoint", convert)
    models = {"initial": job.pivot}
    models["qwen"] = tiny.save_model(job.folder / "qwen", "qwen2", vocab_size=290, seed=2)
    models["phi"] = tiny.save_model(job.folder / "phi", "phi3", vocab_size=310, seed=3)
    for each in (job, lists):
        records, folder = str(each.records), each.folder
        prepare = ["--input", records, "--tokenizer", str(job.hf), "--output", str(each.data)]
        ranks(1, "support.tools:run_tool", "prepare_preferences", prepare)
        for name, model in models.items():
            flags = ["--backend", "megatron", "--model", str(model), "--input", records]
            ranks(1, "support.scoring:score", [*flags, "--output", str(folder / name)])
    return job
