"""The wheel has everything: a whole run by `infifpo` alone, away from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import tiny
from support.launcher import ROOT

# What the wheel is made of; nothing else of the checkout may be needed.
PARTS = ("megatron_infifpo", "setup.py", "pyproject.toml", "README.md", "LICENSE")


def run(*words: object, folder: Path) -> str:
    """Run a command in a folder, without a path to the checkout; what it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Iterator[Path]:
    """A new environment with the wheel in it, which sees the packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / "source" / part)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run(*pip, *build, folder / "source", folder=folder)
    (wheel,) = folder.glob("*.whl")
    made = folder / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", made, folder=folder)
    install = ["--python", made / "bin" / "python", "install", "--no-deps", "--no-index"]
    run(*pip, *install, wheel, folder=folder)
    # Only now, or pip would find the program installed already. A path adds packages, but not
    # what their own .pth files add: the checkout, where the program is installed editable.
    (packages,) = made.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    yield made


RUN = """\
output: out
precision: fp32
pivot: {model: hf}
sources: [{name: qwen, model: qwen}]
data: {pairs: [pairs.jsonl]}
train:
  - {method: infifpo, lr: 1e-3, global_batch_size: 4, seq_length: 256, micro_batch_tokens: 512}
cluster: {at_once: 2}
"""


def test_a_run_by_infifpo_alone(venv, tmp_path):
    """From Hugging Face to Hugging Face, looked at, and skipped when it is asked for again."""

    def infifpo(line: str) -> str:
        return run(venv / "bin" / "infifpo", *line.split(), folder=tmp_path)

    where = "import megatron_infifpo; print(megatron_infifpo.__file__)"
    assert str(venv) in run(venv / "bin" / "python", "-c", where, folder=tmp_path)
    tiny.save_model(tmp_path / "hf", "llama", seed=1)
    tiny.save_model(tmp_path / "qwen", "qwen2", vocab_size=290, seed=2)
    tiny.write_records(tmp_path / "pairs.jsonl", 20)
    (tmp_path / "run.yaml").write_text(RUN)
    printed = infifpo("fuse run.yaml")
    assert "export-infifpo: out/infifpo-hf" in printed and "verify-infifpo: done in" in printed
    out = tmp_path / "out"
    assert (out / "infifpo-hf" / "model.safetensors").exists()
    assert (out / "infifpo" / "report.html").stat().st_size > 50_000
    data = "--data out/data/preference --sources out/sources/infifpo.yaml"
    looks = (
        f"check {data} --run out/infifpo --weights qwen=qwen initial=hf",
        f"inspect {data} --id {json.loads(first_line(tmp_path / 'pairs.jsonl'))['id']}",
        "status run.yaml",
        "fuse run.yaml",
    )
    with ThreadPoolExecutor(2) as pool:  # most of a command is imports
        checked, inspected, status, again = pool.map(infifpo, looks)
    assert "all is as it should be" in checked and "qwen" in inspected
    states = [line.split()[1] for line in status.splitlines()[1:]]
    assert states == ["done"] * len(states) and len(states) > 6
    assert "done already: prepare-preference" in again and "..." not in again


def first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0]
