"""A cluster for all tests, and the folder of a tiny run."""

import sys
from pathlib import Path

import pytest

from support import slurm_cluster as slurm
from support import tiny
from support.launcher import ROOT


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Two nodes of a real SLURM."""
    lacking = slurm.missing()
    if lacking:
        pytest.skip(
            f"no SLURM here: {', '.join(lacking)} missing (apt-get install slurmctld slurmd)"
        )
    made = slurm.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


class Run:
    """A folder with a pivot, records and sources, and what the scripts read from env.sh."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.pivot = tiny.save_model(folder / "models" / "pivot", "llama", seed=1)
        (folder / "data").mkdir()
        for half, count in (("sft", 12), ("preference", 20)):
            tiny.write_records(folder / "data" / f"{half}.jsonl", count)
        lines = ["initial: logprobs/initial", "sources:"]
        for seed, (name, family) in enumerate((("qwen", "qwen2"), ("phi", "phi3")), 2):
            model = tiny.save_model(folder / "models" / name, family, seed=seed)
            score = f"score: {{model: {model}, shard-records: 4}}"
            lines.append(f"  - {{name: {name}, logprobs: logprobs/{name}, {score}}}")
        (folder / "sources.yaml").write_text("\n".join(lines) + "\n")

    @property
    def environment(self) -> dict[str, str]:
        """Two ranks, one a node, in float32."""
        small = "lr=1e-3 global_batch_size=4 micro_batch_tokens=1024 seq_length=512"
        return {
            "VENV": sys.prefix, "NODES": "2", "RANKS": "1", "RUN": str(self.folder),
            "PIVOT": str(self.pivot), "LAYOUT": "tensor=1 pipeline=2 bf16=false",
            "SFT": f"{small} epochs=2", "TRAIN": small, "SCORE": "tensor=1 bf16=false",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        }  # fmt: skip

    def losses(self, job: str) -> dict[int, str]:
        """Loss by step, from the logs of all attempts of a training job; the last one counts.

        The second line of an attempt is left out: Megatron prints the mean of two steps there.
        """
        found: dict[int, str] = {}
        logs = self.folder / "logs"
        for log in sorted(logs.glob(f"*-{job}-*.log"), key=lambda path: path.stat().st_mtime):
            lines = [line for line in log.read_text().splitlines() if "| loss:" in line]
            for line in [*lines[:1], *lines[2:]]:
                step = int(line.split(" iteration ")[1].split("/")[0])
                found[step] = line.split("| loss:")[1].split("|")[0].strip()
        return found


@pytest.fixture
def run_folder(tmp_path) -> Run:
    return Run(tmp_path / "run")


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory) -> Run:
    """One for all tests of a file."""
    return Run(tmp_path_factory.mktemp("shared") / "run")
