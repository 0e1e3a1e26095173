"""Libraries that ask whether CUDA is there, and are told that it is."""

import importlib
import os
import subprocess
import sys
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file

from megatron_infifpo.patches import cpu
from megatron_infifpo.patches.imports import import_when_used

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


def printed(script: str) -> str:
    """What a script prints in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_nothing_is_compiled():
    """Also where somebody has imported PyTorch's compiler before."""
    script = (
        "import torch._dynamo; from megatron_infifpo.patches import cpu; cpu.enable();"
        "print(torch._dynamo.config.disable)"
    )
    assert printed(script) == "True\n"


def test_a_short_start():
    """Megatron is imported without what takes longest, and collections look at none of it."""
    script = (
        "from megatron_infifpo.patches import cpu; cpu.before_megatron(); import gc, sys;"
        "print('megatron.core' in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000,"
        "*sorted({'torch._dynamo', 'torch._inductor', 'wandb.sdk'} & sys.modules.keys()))"
    )
    assert printed(script) == "True True True\n"


def test_compiled_functions_run_as_they_are():
    def double(x):
        return 2 * x

    assert torch.compile(double) is double
    assert torch.compile(dynamic=True)(double) is double


def test_imported_when_used(tmp_path, monkeypatch):
    """A package in name only is the package as soon as something is taken from it."""
    (tmp_path / "large_package").mkdir()
    (tmp_path / "large_package" / "__init__.py").write_text("from large_package.part import two\n")
    (tmp_path / "large_package" / "part.py").write_text("two = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "large_package", raising=False)
    import_when_used("large_package")
    package = importlib.import_module("large_package")
    assert "large_package.part" not in sys.modules
    assert package.two == 2 and type(package) is ModuleType
    assert importlib.import_module("large_package") is package
    import_when_used("large_package")  # it is there
    assert sys.modules["large_package"] is package
    import_when_used("no_such_package")
    assert "no_such_package" not in sys.modules
