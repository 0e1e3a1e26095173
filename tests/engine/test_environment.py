"""`--environment` says what a run would use, whatever is installed."""

import argparse
import re
import sys

import pytest
import torch

from megatron_infifpo.commands import environment as command
from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu

cpu.enable(announce=False)

from megatron_infifpo.engine import environment, layer_kind  # noqa: E402


def test_report_of_this_machine():
    lines = environment.report().splitlines()
    found = {line[2:26].strip(): line[26:].strip() for line in lines if line.startswith("  ")}
    assert found["torch"].startswith(environment.version("torch"))
    assert found["layers, bf16 and fp16"].startswith("Megatron's local ones")
    assert found["CUDA"] == "hidden by CUDA_VISIBLE_DEVICES", "as conftest.py says"
    assert found["collectives"] == "gloo" and found["FP8"].startswith("no:")


@pytest.mark.parametrize("fault", ["driver", "transformer engine"])
def test_where_no_run_starts(monkeypatch, capsys, tmp_path, fault):
    """Versions and the driver are said even then: they are what has to be changed."""
    monkeypatch.setattr(cpu, "_mode", None)
    if fault == "driver":
        monkeypatch.setattr(cpu, "DRIVER", tmp_path)  # there
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        said, devices = "finds no GPU: is the driver older", "none that PyTorch can use"
    else:
        (tmp_path / "transformer_engine").mkdir()
        (tmp_path / "transformer_engine" / "__init__.py").write_text("raise RuntimeError('no abi')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "transformer_engine", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA X100")
        said, devices = "does not import (RuntimeError: no abi)", "2 x NVIDIA X100"
    with pytest.raises(UserError, match=re.escape(said)):
        command.run(argparse.Namespace())
    printed = capsys.readouterr().out
    assert f"devices: {devices}\n" in printed
    for part in ("  torch   ", "  NVIDIA driver", "  CUDA of this PyTorch", "refused: see below"):
        assert part in printed
    assert "collectives" not in printed


def test_with_transformer_engine(monkeypatch):
    """Its layers in half precision, the local ones in float32; gradients are fused."""
    monkeypatch.setattr(layer_kind, "HAVE_TE", True)
    paths = environment.paths(on_cpu=False)
    assert paths["layers, bf16 and fp16"].startswith("Transformer Engine's")
    assert paths["layers, float32"].startswith("Megatron's")
    assert paths["FP8"] == "yes"
    assert paths["weight gradients"] == "added by the products themselves"
    assert paths["attention"].startswith("PyTorch's variable-length flash kernel")


def test_an_old_pytorch(monkeypatch):
    """2.11's function has no grouped heads: every layer would fail."""
    import torch.nn.attention.varlen as varlen

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        raise AssertionError

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    assert "2.12's has" in environment.attention(on_cpu=False)


@pytest.mark.parametrize("active, expected", [(None, "not installed"), ("FA3", "FA3 is active")])
def test_flash_attention_3(monkeypatch, active, expected):
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: active)
    assert environment.flash_attention_3() == expected


def test_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "version")
    assert environment.driver_version() is None
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:21:30 UTC 2025"
    (tmp_path / "version").write_text(f"{text}\nGCC version: 12\n")
    assert "580.65.06" in str(environment.driver_version())
