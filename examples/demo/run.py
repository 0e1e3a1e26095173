#!/usr/bin/env python
"""The main job, end to end, on two CPU cores: fuse two specialists into SmolLM2 by InfiFPO.

Every stage is a command that works the same at scale; finished stages are skipped on a rerun.

    make demo                                   # or, in an environment that has everything:
    python examples/demo/run.py --output runs/demo
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import table
from pivot import save_pivot
from specialists import train_all

from megatron_infifpo.cli import UserError, run

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent.parent / "tools"
SPLITS = ("train", "heldout")
# Sources speak other vocabularies; the coder takes part for code alone.
SOURCES = {"generalist": None, "coder": ["code"]}
TRAIN = ["--method", "infifpo", "--lr", "2e-5", "--lr-decay-style", "cosine"]
TRAIN += ["--lr-warmup-fraction", "0.1", "--clip-grad", "1.0", "--weight-decay", "0.0"]
TRAIN += ["--global-batch-size", "12", "--micro-batch-size", "3", "--preference-epochs", "5"]
TRAIN += ["--seq-length", "1024", "--log-interval", "5", "--seed", "1234"]


class Demo:
    """The stages of the demo in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.monotonic()
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def stage(self, title: str) -> None:
        print(f"\n=== {time.monotonic() - self.started:4.0f} s  {title}", flush=True)

    def command(self, *words: str, ranks: int = 0) -> None:
        """Run a command of the project and print it; `ranks` > 0 starts it under torchrun."""
        launcher = [sys.executable]
        if ranks:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            launcher += ["--master-port", str(port)]
        shown = ["torchrun", "--nproc-per-node", str(ranks)] if ranks else ["python"]
        print("$", " ".join([*shown, *words]).replace(f"{HERE.parent.parent}/", ""), flush=True)
        threads = {"OMP_NUM_THREADS": "1" if ranks > 1 else "2"}
        done = subprocess.run([*launcher, *words], env={**self.env, **threads}, check=False)
        if done.returncode:
            raise UserError(f"the stage above failed with exit code {done.returncode}")

    def score(self, name: str, model: Path, split: str, *flags: str, ranks: int = 0) -> None:
        """Score a split under a model, unless that is done."""
        output = self.folder / "logprobs" / f"{split}-{name}"
        if output.with_suffix(".json").exists():
            return
        inputs = ["--input", str(HERE / "data" / f"{split}.jsonl"), "--output", str(output)]
        script = str(TOOLS / "score_source.py")
        self.command(script, "--model", str(model), "--name", name, *inputs, *flags, ranks=ranks)

    def write_sources(self, split: str) -> Path:
        """Write the sources.yaml of a split (JSON is YAML too)."""
        path = self.folder / f"sources-{split}.yaml"
        sources = []
        for name, domains in SOURCES.items():
            entry = {"name": name, "logprobs": f"logprobs/{split}-{name}"}
            sources.append(entry | ({"domains": domains} if domains else {}))
        content = {"initial": f"logprobs/{split}-pivot", "sources": sources}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to work in")
    parser.add_argument("--fresh", action="store_true", help="delete the folder first")
    args = parser.parse_args()
    if args.fresh:
        shutil.rmtree(args.output, ignore_errors=True)
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    demo = Demo(folder)
    convert = str(TOOLS / "convert_checkpoint.py")

    demo.stage("get the pivot, SmolLM2-135M-Instruct, and train two specialists as its sources")
    hf_pivot = save_pivot(folder / "pivot-hf")
    sources = train_all(folder / "sources")

    demo.stage("import the pivot: Hugging Face -> Megatron")
    pivot = folder / "pivot"
    if not pivot.exists():
        demo.command(convert, "import", "--hf", str(hf_pivot), "--save", str(pivot))

    demo.stage("tokenize the preference pairs for the pivot")
    for split in SPLITS:
        prefix = folder / "data" / split
        if not prefix.with_suffix(".json").exists():
            records = str(HERE / "data" / f"{split}.jsonl")
            flags = ["--input", records, "--tokenizer", str(hf_pivot), "--output", str(prefix)]
            demo.command(str(TOOLS / "prepare_preferences.py"), *flags)

    demo.stage("score every pair: the pivot at PP 2, the specialists at TP 2")
    pipeline = ["--backend", "megatron", "--pipeline-model-parallel-size", "2"]
    tensor = ["--backend", "megatron", "--tensor-model-parallel-size", "2"]
    for split in SPLITS:
        demo.score("pivot", pivot, split, *pipeline, ranks=2)
        for name, model in sources.items():
            demo.score(name, model, split, *tensor, ranks=2)

    demo.stage("train by InfiFPO on two ranks, PP 2")
    trained, train_sources = folder / "run", demo.write_sources("train")
    heldout_sources = demo.write_sources("heldout")
    demo.command(
        "-m", "megatron_infifpo.train", *TRAIN,
        "--preference-data", str(folder / "data" / "train"),
        "--preference-sources", str(train_sources),
        "--preference-valid-data", str(folder / "data" / "heldout"),
        "--preference-valid-sources", str(heldout_sources),
        "--pretrained-checkpoint", str(pivot), "--save", str(trained), "--save-interval", "20",
        "--pipeline-model-parallel-size", "2", "--use-distributed-optimizer",
        "--tensorboard-dir", str(folder / "tensorboard"), "--tensorboard-log-interval", "1",
        ranks=2,
    )  # fmt: skip

    demo.stage("export: Megatron -> Hugging Face, and score the held-out pairs with transformers")
    exported = folder / "fused-hf"
    if not exported.exists():
        demo.command(convert, "export", "--load", str(trained), "--save", str(exported))
    demo.score("fused", exported, "heldout", "--backend", "transformers")
    demo.score("fused-megatron", trained, "heldout", *pipeline, ranks=2)

    demo.stage("held-out pairs before and after")
    table.check_export(folder / "logprobs")
    table.print_table(folder)
    print(f"\ndone in {time.monotonic() - demo.started:.0f} s: the fused model is in {exported}")


if __name__ == "__main__":
    run(main)
