#!/usr/bin/env python
"""The main job, end to end, on two CPU cores: fuse two specialists into SmolLM2 by InfiFPO.

Every stage is a command that works the same at scale; finished stages are skipped on a rerun.

    make demo                                   # or, in an environment that has everything:
    python examples/demo/run.py --output runs/demo
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import table
from gemma import save_gemma
from pivot import save_pivot
from specialists import train_all
from tqdm import tqdm

from megatron_infifpo.cli import UserError, run

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent.parent / "tools"
SPLITS = ("train", "heldout")
# Sources that take part in some domains only; the others in all.
DOMAINS = {"coder": ["code"]}
# The published learning rate of 1e-7 is for 14B parameters and 587 steps; this is 135M and 12.
TRAIN = ["--method", "infifpo", "--lr", "5e-5", "--min-lr", "5e-6", "--lr-decay-style", "cosine"]
TRAIN += ["--lr-warmup-fraction", "0.1", "--clip-grad", "1.0", "--weight-decay", "0.0"]
TRAIN += ["--global-batch-size", "8", "--micro-batch-size", "1", "--train-iters", "12"]
TRAIN += ["--seq-length", "1024", "--log-interval", "1", "--seed", "1234"]


class Demo:
    """The stages of the demo in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started = time.monotonic()
        # What is missing on a CPU is warned about by every library, in every process.
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        self.env = {**os.environ, **quiet}

    def stage(self, title: str) -> None:
        print(f"\n=== {time.monotonic() - self.started:4.0f} s  {title}", flush=True)

    def command(self, *words: str, ranks: int = 0, log: Path | None = None) -> None:
        """Run a command of the project and print it.

        `ranks` > 0 starts it under torchrun. With `log`, its output goes there and a bar shows
        the steps that it reports.
        """
        launcher = [sys.executable]
        if ranks:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            launcher += ["--master-port", str(port)]
        shown = ["torchrun", "--nproc-per-node", str(ranks)] if ranks else ["python"]
        print("$", " ".join([*shown, *words]).replace(f"{HERE.parent.parent}/", ""), flush=True)
        env = {**self.env, "OMP_NUM_THREADS": "1" if ranks > 1 else "2"}
        output = {} if log is None else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([*launcher, *words], env=env, text=True, **output)
        if log is not None:
            show_steps(process.stdout, log)
        if process.wait():
            where = "" if log is None else f"; see {log}"
            raise UserError(f"the stage above failed with exit code {process.returncode}{where}")

    def score(self, name: str, model: Path, split: str, *flags: str, ranks: int = 0) -> None:
        """Score a split under a model, unless that is done."""
        output = self.folder / "logprobs" / f"{split}-{name}"
        if output.with_suffix(".json").exists():
            return
        inputs = ["--input", str(HERE / "data" / f"{split}.jsonl"), "--output", str(output)]
        script = str(TOOLS / "score_source.py")
        self.command(script, "--model", str(model), "--name", name, *inputs, *flags, ranks=ranks)

    def write_sources(self, split: str, names: Iterable[str]) -> Path:
        """Write the sources.yaml of a split (JSON is YAML too)."""
        path = self.folder / f"sources-{split}.yaml"
        sources = []
        for name in names:
            entry = {"name": name, "logprobs": f"logprobs/{split}-{name}"}
            sources.append(entry | ({"domains": DOMAINS[name]} if name in DOMAINS else {}))
        content = {"initial": f"logprobs/{split}-pivot", "sources": sources}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def show_steps(lines: Iterable[str], log: Path) -> None:
    """Copy a training's output into a file, and its step lines into a progress bar."""
    with open(log, "w", encoding="utf-8") as file, tqdm(desc="train", unit="step") as bar:
        for line in lines:
            file.write(line)
            step = re.search(r"iteration +(\d+)/ +(\d+) .*\| loss: (\S+)", line)
            if step:
                bar.total = int(step[2])
                bar.set_postfix(loss=f"{float(step[3]):.3f}", refresh=False)
                bar.update(int(step[1]) - bar.n)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to work in")
    parser.add_argument(
        "--gemma",
        action="store_true",
        help="add Gemma-3-270M as a source: needs its package, and accepting the Gemma terms",
    )
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
    if args.gemma:
        gemma = save_gemma(folder / "gemma-hf")

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
    # Short rows keep both pipeline stages busy.
    pipeline = ["--backend", "megatron", "--row-tokens", "1024"]
    pipeline += ["--pipeline-model-parallel-size", "2"]
    tensor = ["--backend", "megatron", "--tensor-model-parallel-size", "2"]
    for split in SPLITS:
        demo.score("pivot", pivot, split, *pipeline, ranks=2)
        for name, model in sources.items():
            demo.score(name, model, split, *tensor, ranks=2)
        if args.gemma:
            demo.score("gemma", gemma, split, "--backend", "transformers")

    demo.stage("train by InfiFPO on two ranks, PP 2")
    names = [*sources, *(["gemma"] if args.gemma else [])]
    trained, train_sources = folder / "run", demo.write_sources("train", names)
    heldout_sources = demo.write_sources("heldout", names)
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
        log=folder / "train.log",
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
