"""Libraries that ask whether CUDA is there, and are told that it is."""

import os
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from megatron_infifpo.patches import cpu

cpu.enable(announce=False)


def test_pinned_memory_needs_no_driver():
    assert torch.ones(2).pin_memory().sum() == 2
    assert torch.zeros(3, device="cuda", pin_memory=True).device.type == "cpu"


def test_safetensors_to_cuda(tmp_path):
    """It reads through pinned memory."""
    weights = {"a": torch.arange(6.0).reshape(2, 3)}
    save_file(weights, tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors", device="cuda")
    assert torch.equal(loaded["a"], weights["a"])


def test_nothing_is_compiled():
    """Also where somebody has imported PyTorch's compiler before."""
    script = (
        "import torch._dynamo; from megatron_infifpo.patches import cpu; cpu.enable();"
        "print(torch._dynamo.config.disable)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout == "True\n"
