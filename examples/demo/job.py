"""The commands of a fusion job, run as a user would; what the examples share.

Every method is a command line, which it prints. A finished one is skipped on a rerun, and refused
if its flags are others by then.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path

from tqdm import tqdm

from megatron_infifpo.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# As a module: it needs no script on PATH, and torchrun starts it so, too.
PROGRAM = ["-m", "megatron_infifpo"]
Domains = dict[str, list[str]]  # of the sources that take part in some only
# How scoring uses the ranks; their number follows.
LAYOUTS = {
    # Short rows keep all pipeline stages busy.
    "pipeline": ["--micro-batch-tokens", "1024", "--pipeline-model-parallel-size"],
    "tensor": ["--tensor-model-parallel-size"],
}


def count_gpus() -> int:
    """GPUs that a command sees; asked in a process of its own, so that this one holds none."""
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    asked = [sys.executable, "-W", "ignore", "-c", code]
    return int(subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout)


class Job:
    """A folder with everything that one pivot's fusion makes, on two ranks or one GPU.

    Attributes:
        gpus: that a command sees.
        ranks: of training and scoring: two, which share a CPU's cores but not a GPU.
        beside: another command runs at the same time, so that this one has a core alone.
    """

    def __init__(self, folder: Path, records: dict[str, Path]):
        """Work in a folder, on the given preference files by the name of their split."""
        self.gpus, self.beside = count_gpus(), False
        self.ranks = 1 if self.gpus == 1 else 2
        self.folder = folder.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.records = records
        self.started = time.monotonic()
        # What is missing on a CPU is warned about by every library, in every process.
        quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
        self.env = {**os.environ, **quiet}

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stage(self, title: str) -> None:
        print(f"\n=== {self.seconds():4.0f} s  {title}", flush=True)

    def command(self, *words: object, ranks: int = 0, log: Path | None = None) -> None:
        """Run `infifpo WORDS` and print it.

        `ranks` > 1 starts it under torchrun. With `log`, its output goes there and a bar shows
        the steps that it reports.
        """
        launcher = [sys.executable]
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            launcher += ["--master-port", str(port)]
        argv = [str(word) for word in words]
        torchrun = ["torchrun", "--nproc-per-node", str(ranks), *PROGRAM]
        shown = torchrun if ranks > 1 else ["infifpo"]
        print("$", " ".join([*shown, *argv]).replace(f"{ROOT}/", ""), flush=True)
        env = {**self.env, "OMP_NUM_THREADS": "1" if ranks > 1 or self.beside else "2"}
        pipe = None if log is None else subprocess.PIPE
        joined = None if log is None else subprocess.STDOUT
        command = [*launcher, *PROGRAM, *argv]
        process = subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=joined)
        if log is not None:
            assert process.stdout is not None
            show_steps(process.stdout, log)
        if process.wait():
            where = "" if log is None else f"; see {log}"
            raise UserError(f"the stage above failed with exit code {process.returncode}{where}")

    def once(self, name: str, *words: object, ranks: int = 0, log: Path | None = None) -> None:
        """Run a command unless it is finished; `name` says what it makes."""
        stamp = self.folder / "commands" / name
        line = " ".join(str(word) for word in words)
        if self.beside and log is None:
            log = self.folder / f"{name}.log"
        if not stamp.exists():
            self.command(*words, ranks=ranks, log=log)
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(line + "\n", encoding="utf-8")
        elif stamp.read_text(encoding="utf-8") != line + "\n":
            raise UserError(
                f"{name} in {self.folder} was made with other flags, see {stamp}: choose another "
                "--output, or delete the folder"
            )

    def import_pivot(self, hf: Path) -> Path:
        """Convert the pivot, Hugging Face -> Megatron."""
        pivot = self.folder / "pivot"
        self.once("pivot", "import", "--hf", hf, "--save", pivot)
        return pivot

    def tokenize(self, split: str, tokenizer: Path) -> None:
        """Tokenize a split for the pivot."""
        prefix = self.folder / "data" / split
        flags = ["--input", self.records[split], "--tokenizer", tokenizer, "--output", prefix]
        self.once(f"data-{split}", "prepare", *flags)

    def side_by_side(self, *works: Callable[["Job"], object]) -> None:
        """Do works, each a function of a job: on a CPU two at a time, on one core and rank each."""
        if self.gpus:
            for work in works:
                work(self)
            return
        alone = copy(self)
        alone.ranks, alone.beside = 1, True
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(work, alone) for work in works]:
                done.result()

    def score(
        self, split: str, name: str, model: Path, layout: str = "pipeline", *flags: str
    ) -> None:
        """Score a split under a model, laid out on all ranks or by transformers in one process."""
        output = self.folder / "logprobs" / f"{split}-{name}"
        words = ["--model", model, "--name", name, "--input", self.records[split]]
        words += ["--output", output, *flags]
        if layout == "transformers":
            ranks, words = 0, [*words, "--backend", "transformers"]
        else:
            ranks = self.ranks
            words += ["--backend", "megatron", *LAYOUTS[layout], str(ranks)]
        self.once(f"logprobs-{split}-{name}", "score", *words, ranks=ranks)

    def sources(
        self, split: str, initial: str, names: Iterable[str], domains: Domains | None = None
    ) -> Path:
        """Write a sources.yaml (JSON is YAML too) and return its path."""
        names = list(names)
        path = self.folder / "sources" / f"{split}-{initial}-{'-'.join(names)}.yaml"
        entries = []
        for name in names:
            entry = {"name": name, "logprobs": f"../logprobs/{split}-{name}"}
            limits = (domains or {}).get(name)
            entries.append(entry | ({"domains": limits} if limits else {}))
        content = {"initial": f"../logprobs/{split}-{initial}", "sources": entries}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path

    def train(self, name: str, split: str, start: Path, *flags: object) -> Path:
        """Train on a split from a checkpoint, a pipeline stage a rank; return the run's folder."""
        run = self.folder / name
        self.once(
            name, "train", *flags,
            "--preference-data", self.folder / "data" / split,
            "--pretrained-checkpoint", start, "--save", run, "--save-interval", "1000",
            "--pipeline-model-parallel-size", self.ranks, "--use-distributed-optimizer",
            "--tensorboard-dir", run / "tensorboard", "--tensorboard-log-interval", "1",
            ranks=self.ranks,
            log=self.folder / f"{name}.log",
        )  # fmt: skip
        return run

    def export(self, run: Path) -> Path:
        """Convert a trained checkpoint, Megatron -> Hugging Face."""
        hf = run.with_name(f"{run.name}-hf")
        self.once(hf.name, "export", "--load", run, "--save", hf)
        return hf


def show_steps(lines: Iterable[str], log: Path) -> None:
    """Copy a command's output into a file, and a training's step lines into a progress bar."""
    bar = None
    with open(log, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            step = re.search(r"iteration +(\d+)/ +(\d+) .*\| loss: (\S+)", line)
            if step:
                if bar is None:
                    bar = tqdm(desc=f"train {log.stem}", total=int(step[2]), unit="step")
                bar.set_postfix(loss=f"{float(step[3]):.3f}", refresh=False)
                bar.update(int(step[1]) - bar.n)
    if bar is not None:
        bar.close()
