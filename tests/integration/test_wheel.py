"""The wheel has everything: the demo's pipeline by `infifpo` alone, away from the checkout."""

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


def test_the_demo_by_infifpo_alone(venv, tmp_path):
    def infifpo(*words: object) -> str:
        return run(venv / "bin" / "infifpo", *words, folder=tmp_path)

    where = "import megatron_infifpo; print(megatron_infifpo.__file__)"
    assert str(venv) in run(venv / "bin" / "python", "-c", where, folder=tmp_path)
    tiny.save_model(tmp_path / "hf", "llama", seed=1)
    tiny.save_model(tmp_path / "qwen", "qwen2", vocab_size=290, seed=2)
    tiny.write_records(tmp_path / "pairs.jsonl", 8)
    sources = "initial: initial\nsources: [{name: qwen, logprobs: qwen-logprobs}]\n"
    (tmp_path / "sources.yaml").write_text(sources)

    def together(*commands: str) -> list[str]:
        """Most of a command is imports, so two go beside each other."""
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda line: infifpo(*line.split()), commands))

    score = "score --backend megatron --input pairs.jsonl"
    together("split --input pairs.jsonl --sft sft.jsonl --preference rest.jsonl", "launch list")
    together(
        "import --hf hf --save pivot",
        "prepare --input pairs.jsonl --tokenizer hf --output data",
        f"{score} --model qwen --output qwen-logprobs",
        "plan --model hf --gpus 2",
    )
    together(f"{score} --model pivot --output initial", "verify --hf hf --load pivot")
    infifpo(*(
        "train --method infifpo --preference-data data --preference-sources sources.yaml "
        "--pretrained-checkpoint pivot --save run --save-interval 2 --train-iters 2 --lr 1e-3 "
        "--lr-decay-style constant --global-batch-size 4 --micro-batch-size 2 --seq-length 256 "
        "--tensorboard-dir run/tensorboard --tensorboard-log-interval 1"
    ).split())  # fmt: skip
    printed = together(
        "export --load run --save fused",
        "inspect --data data --sources sources.yaml --id pairs-0 --tokens",
        "check --data data --sources sources.yaml --run run --weights qwen=qwen initial=pivot",
        "report run",
    )
    assert (tmp_path / "fused" / "model.safetensors").exists()
    assert "qwen" in printed[1] and "all is as it should be" in printed[2]
    assert (tmp_path / "run" / "report.html").stat().st_size > 50_000
