"""Token-level fusion on a real SLURM: baselines.sh, from records and models to merged weights."""

import json
import re

import pytest
from safetensors.torch import load_file

from megatron_infifpo.references.soft_targets import SoftTargetStore
from support.launcher import ROOT

pytestmark = pytest.mark.slurm
SCRIPTS = ROOT / "examples" / "slurm"


def logs(run) -> str:
    files = sorted((run.folder / "logs").glob("*"))
    return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)


def test_baselines(cluster, run_folder, monkeypatch):
    """The script waits for conversion; then three methods, of all sources or of each alone."""
    run = run_folder.folder
    environment = {**run_folder.environment, "INFIFPO_ENV": str(SCRIPTS / "env.sh")}
    environment |= {"SFT": run_folder.environment["TRAIN"], "LOGS": str(run / "logs")}
    # One rank; test_jobs.py has two.
    environment |= {"NODES": "1", "LAYOUT": "tensor=1 pipeline=1 bf16=false"}
    environment |= {"FUSE": 'ambiguous=id flags="--top-k 8"', "MERGE": 'flags="--select-top 0.5"'}
    monkeypatch.chdir(ROOT)
    (run / "logs").mkdir()
    words = ("sbatch", "--parsable", "--nodes=1", f"--output={run}/logs/%x-%j.out")
    convert = cluster.run(*words, SCRIPTS / "convert.sbatch", **environment).strip()
    printed = cluster.run("bash", SCRIPTS / "baselines.sh", convert, **environment)
    (last,) = re.findall(r"^merge (\d+)$", printed, flags=re.M)
    assert cluster.wait(last, 600) == "COMPLETED", logs(run_folder)
    for job in re.findall(r"export (\d+)", printed):
        assert cluster.wait(job, 120) == "COMPLETED", logs(run_folder)
    assert (run / "fusion" / "sources.yaml").readlink().name == "sources.yaml"
    assert not (run / "logprobs").exists(), "of the other half, which nobody has scored"
    names = {"fusellm", "infifusion", "fusechat-qwen", "fusechat-phi"}
    sources: dict[str, tuple[str, ...]] = {
        "fusechat-qwen": ("qwen", "initial"),
        "fusechat-phi": ("phi", "initial"),
    }
    sources |= {"fusellm": ("qwen", "phi", "initial"), "infifusion": ("qwen", "phi")}
    pivot = load_file(run_folder.pivot / "model.safetensors")
    trained = {}
    for name in names:
        store = SoftTargetStore(run / "fusion" / name)
        assert store.sources == sources[name] and store.top_k == 8
        assert store.manifest["ambiguous"] == (None if name == "infifusion" else "id")
        found = json.loads((run / name / "run.json").read_text())
        assert found["identity"]["data"]["soft_targets"]["targets_sha256"] == store.fingerprint
        trained[name] = load_file(run / f"{name}-hf" / "model.safetensors")
        assert any((trained[name][key] != pivot[key]).any() for key in pivot)
    assert len({str(weights["model.norm.weight"].tolist()) for weights in trained.values()}) == 4
    merged = load_file(run / "fusechat-hf" / "model.safetensors")
    assert merged.keys() == pivot.keys()
    assert any((merged[key] != pivot[key]).any() for key in pivot)
