"""`infifpo fuse --executor slurm`: a chain of jobs; the same command goes on after a failure."""

import json
import re
import sys

import pytest

from megatron_infifpo.storage.checkpoints import TRACKER
from support import tiny
from support.launcher import ROOT

pytestmark = pytest.mark.slurm

RUN = """\
output: {folder}/out
precision: fp32
pivot: {{model: {folder}/pivot}}
sources: [{{name: qwen, model: {folder}/qwen, flags: {{shard-records: 4}}}}]
data: {{pairs: [{folder}/pairs.jsonl]}}
train:
  - method: infifpo
    lr: 1e-3
    global_batch_size: 4
    seq_length: 512
    micro_batch_tokens: 1024
    layout: {{pipeline: 2}}
cluster: {{executor: slurm, nodes: 2, ranks: 1, retries: 0, sbatch: {{gpus-per-node: 1}}}}
"""


def infifpo(cluster, *words: str) -> str:
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return cluster.run(sys.executable, "-m", "megatron_infifpo", *words, **environment)


def test_chain(cluster, tmp_path):
    tiny.save_model(tmp_path / "pivot", "llama", seed=1)
    tiny.save_model(tmp_path / "qwen", "qwen2", seed=2)
    tiny.write_records(tmp_path / "pairs.jsonl", 16)
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(folder=tmp_path))
    out = tmp_path / "out"
    # What is not there when a job begins: it fails, and what waits for it never starts.
    hidden = (tmp_path / "qwen" / "model.safetensors").rename(tmp_path / "hidden")
    jobs = dict(re.findall(r"^(\S+): job (\d+)$", infifpo(cluster, "fuse", str(file)), re.M))
    assert list(jobs)[:4] == ["prepare-preference", "score-qwen", "score-pivot", "infifpo"]
    assert cluster.wait(jobs["score-qwen"]) == "FAILED"
    assert "model.safetensors" in (out / "stages" / "score-qwen" / "log").read_text()
    assert cluster.wait(jobs["infifpo"]) == "CANCELLED"
    assert cluster.wait(jobs["score-pivot"]) == "COMPLETED"
    hidden.rename(tmp_path / "qwen" / "model.safetensors")
    # The stamp of what failed is of other weights, which had not been read: it says so.
    again = infifpo(cluster, "fuse", str(file), "--redo", "score-qwen")
    more = dict(re.findall(r"^(\S+): job (\d+)$", again, re.M))
    assert {"prepare-preference", "score-pivot"}.isdisjoint(more)
    for name in ("score-qwen", "infifpo", "export-infifpo", "verify-infifpo"):
        assert cluster.wait(more[name]) == "COMPLETED", (out / "stages" / name / "log").read_text()
    assert (out / "infifpo" / TRACKER).read_text() == "4"
    run = json.loads((out / "infifpo" / "run.json").read_text())
    assert run["attempts"][-1]["layout"]["pipeline_model_parallel_size"] == 2
    assert (out / "infifpo-hf" / "config.json").exists()
    assert all(line.split()[1] == "done" for line in table(cluster, file)[1:])
    assert "all is done" in infifpo(cluster, "fuse", str(file))


def table(cluster, file) -> list[str]:
    lines = infifpo(cluster, "status", str(file)).splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith("stage ")) :]
