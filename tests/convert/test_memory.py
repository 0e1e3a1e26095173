"""Peak memory of conversion: that of a few tensors, whatever the size of the checkpoint."""

import json
import subprocess
import sys

import torch

from megatron_infifpo.families import weight_mapping
from megatron_infifpo.storage.safetensors_io import SafetensorsWriter

CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 8192,
    "max_position_embeddings": 64, "num_attention_heads": 8, "num_hidden_layers": 6,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "vocab_size": 16384, "dtype": "float32",
}  # fmt: skip
LARGEST = 64 * 2**20  # the embedding, the output layer, and linear_fc1
MEASURE = """
import sys
def peak():
    # Of this program alone: ru_maxrss would begin with the one that started it.
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if "VmHWM" in l)
import torch, torch.distributed.checkpoint
import megatron_infifpo.convert.hf_import, megatron_infifpo.convert.hf_export
from megatron_infifpo.commands.main import run_words
before = peak()
run_words(sys.argv[1:])
print(peak() - before)
"""


def test_peak_memory(tmp_path):
    """840 MB of weights in less than 290 MB beyond what the program needs to start."""
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(CONFIG))
    shapes = {
        name: shape
        for entry in weight_mapping(CONFIG).entries()
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    with SafetensorsWriter(hf / "model.safetensors", shapes, torch.float32) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape))
    total = (hf / "model.safetensors").stat().st_size
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for words in (
        ["import", "--hf", hf, "--save", megatron],
        ["export", "--load", megatron, "--save", back],
    ):
        program = [sys.executable, "-W", "ignore", "-c", MEASURE]
        done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        used = int(done.stdout.splitlines()[-1])
        assert used < 2 * LARGEST + 160 * 2**20 < total / 2, words[0]
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()
