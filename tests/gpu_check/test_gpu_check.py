"""The command on a CPU, as continuous integration runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_infifpo.gpu_check import processes
from megatron_infifpo.gpu_check.records import read_checks
from megatron_infifpo.gpu_check.runner import GROUPS
from support.launcher import ROOT


def gpu_check(*flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/gpu_check.py", *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.mark.timeout(900)  # of nine groups
def test_quick_on_a_cpu(tmp_path):
    done = gpu_check(
        "--device", "cpu", "--quick", "--timeout", 600, "--json", tmp_path / "report.json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    passed = {c["group"] for c in report["checks"] if c["status"] == "passed"}
    names = ["environment", *(group.name for group in GROUPS)]
    assert passed == set(names)
    assert not [c for c in report["checks"] if c["status"] == "failed"]
    values = {c["name"]: c["value"] for c in report["checks"]}
    assert values["llama: host waits of a step's forward and backward passes"] <= 3.0
    assert report["machine"]["packages"]["torch"] == torch.__version__.split("+")[0]
    for name in names:
        assert f"] {name}: " in done.stderr, "a line of progress a group"
    assert "passed" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = gpu_check("--json", tmp_path / "report.json")
    assert done.returncode == 2
    assert "error: CUDA cannot be used" in done.stderr and "docs/clusters.md" in done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["exit_code"] == 2


def test_a_report_that_could_not_be_written_is_refused_first(tmp_path):
    done = gpu_check("--json", tmp_path / "missing" / "report.json")
    assert done.returncode == 2 and "there is no folder" in done.stderr


def test_families_on_transformer_engine(tmp_path):
    """The kinds of layers that only a GPU has, with emulated kernels."""
    folders = Path(os.environ.get("INFIFPO_TE", ROOT / ".venv" / "te"))
    versions = sorted(folder for folder in folders.glob("2.*") if folder.is_dir())
    if not versions:
        pytest.skip(f"no Transformer Engine in {folders}: run tests/gpu/fetch_te.sh .venv")
    argument = [str(versions[-1]), str(tmp_path / "models"), str(tmp_path / "checks.jsonl")]
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    processes.run(
        "support.te_families:families", argument, tmp_path / "run", seconds=600, environment=hidden
    )
    checks = read_checks(tmp_path / "checks.jsonl")
    assert len(checks) == 2 * 4 * 2  # families, kinds of layers, log-probs and gradients
    assert {check.status for check in checks} == {"passed"}
    assert any(check.name == "gemma3, te-attention bf16: gradients" for check in checks)
