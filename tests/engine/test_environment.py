"""`--environment` says what a run would use, whatever is installed."""

import pytest

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
