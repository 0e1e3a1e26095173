"""Starting where Transformer Engine is broken or useless, where the driver is too old, on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu
from support import tiny
from support.launcher import ROOT

HERE = Path(__file__).resolve().parent
# As a command line does, on a machine whose PyTorch says that there is a GPU, or has a driver.
START = """
import pathlib, runpy, sys, torch
situation, program, sys.argv = sys.argv[1], sys.argv[2], sys.argv[2:]
if situation == "gpu":
    torch.cuda.is_available = lambda: True
if situation == "driver":
    import megatron_infifpo.patches.cpu
    megatron_infifpo.patches.cpu.DRIVER = pathlib.Path("/dev/null")
runpy.run_module(program, run_name="__main__", alter_sys=True)
"""
# Nothing of what they name is there; that is not what they begin with.
COMMANDS = {
    "train": "megatron_infifpo train --method dpo --preference-data x",
    "score": "megatron_infifpo score --backend megatron --model x --input x --output x",
}
BROKEN = {
    "no library": "raise RuntimeError('Found empty `transformer-engine` meta package')",
    "no CUDA": "raise OSError('libcudart.so.13: cannot open shared object file')",
}


def start(situation: str, words: str, path: Path | None = None):
    """Start a command in a situation: "gpu", "driver" or "cpu"."""
    paths = [str(path)] * (path is not None) + [str(ROOT)]
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    env = kept | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-W", "ignore", "-c", START, situation, *words.split()]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture
def broken_te(tmp_path):
    """Make an installed Transformer Engine that does not import; return its folder."""

    def make(how: str) -> Path:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine" / "__init__.py").write_text(BROKEN[how])
        return tmp_path

    return make


@pytest.mark.parametrize(("command", "how"), [("train", "no library"), ("score", "no CUDA")])
def test_broken_te_on_a_gpu(broken_te, command, how):
    """One sentence, and not training on other layers in silence."""
    done = start("gpu", COMMANDS[command], broken_te(how))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Transformer Engine is installed but does not import (")
    assert BROKEN[how].split("'")[1] in line and "transformer-engine[pytorch]" in line


def test_te_on_a_cpu(broken_te, tmp_path):
    """A login node has no GPU: what is installed for one is not even imported."""
    records, tokenizer = tmp_path / "pairs.jsonl", tmp_path / "tokenizer"
    tiny.write_records(records, 3)
    tiny.save_tokenizer(tokenizer, 300)
    words = f"megatron_infifpo prepare --input {records} --tokenizer {tokenizer}"
    done = start("cpu", f"{words} --output {tmp_path}/data", broken_te("no CUDA"))
    assert done.returncode == 0, done.stderr
    assert "3 records" in done.stdout


def test_stand_ins_hide_te(broken_te):
    """Its Adam and its layers would be chosen for a CPU otherwise."""
    script = "from megatron_infifpo.patches import cpu; cpu.enable(); import transformer_engine"
    env = os.environ | {"PYTHONPATH": f"{broken_te('no CUDA')}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert "ModuleNotFoundError: import of transformer_engine halted" in done.stderr


def test_a_driver_without_cuda():
    done = start("driver", COMMANDS["train"])
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: this machine has an NVIDIA driver (/dev/null), but PyTorch")


@pytest.mark.parametrize("asked", ["", "-1"])
def test_who_asks_for_the_cpu(monkeypatch, asked):
    monkeypatch.setattr(cpu, "DRIVER", Path("/dev/null"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match="finds no GPU"):
        cpu._refuse_an_unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", asked)
    cpu._refuse_an_unused_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError):
        cpu._refuse_an_unused_gpu()


def test_helpers_and_warm_up(ranks):
    """Not by the CPU's stand-ins, which a GPU does not have: see patches/startup.py."""
    assert "compile_helpers" not in Path(cpu.__file__).read_text(encoding="utf-8")
    (found,) = ranks(1, "support.startup:start_megatron")
    assert found == {"helpers before": "megatron.core.datasets.utils", "processes": [], "ops": 0}
