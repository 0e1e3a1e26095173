"""A tiny pivot, two sources and preference data, made once through the program's commands."""

from pathlib import Path

from support import tiny
from support.launcher import Ranks


class Setup:
    """Folders of a tiny preference-training job."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.hf = folder / "hf"
        self.pivot = folder / "pivot"
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


def make(folder: Path, ranks: Ranks) -> Setup:
    """Import the pivot, prepare the pairs, score them under the pivot and two sources."""
    job = Setup(folder)
    tiny.save_model(job.hf, "llama", seed=1)
    tiny.write_records(job.records, 20)
    convert = ["import", "--hf", str(job.hf), "--save", str(job.pivot)]
    ranks(1, "support.tools:run_tool", "convert_checkpoint", convert)
    prepare = ["--input", str(job.records), "--tokenizer", str(job.hf), "--output", str(job.data)]
    ranks(1, "support.tools:run_tool", "prepare_preferences", prepare)
    models = {"initial": job.pivot}
    models["qwen"] = tiny.save_model(job.folder / "qwen", "qwen2", vocab_size=290, seed=2)
    models["phi"] = tiny.save_model(job.folder / "phi", "phi3", vocab_size=310, seed=3)
    for name, model in models.items():
        flags = ["--backend", "megatron", "--model", str(model), "--input", str(job.records)]
        ranks(1, "support.scoring:score", [*flags, "--output", str(job.folder / name)])
    return job
