"""Peak memory of conversion: that of a few tensors, whatever the size of the checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_infifpo.convert.hf_shards import shapes_of
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
import megatron_infifpo.convert.merge
from megatron_infifpo.commands.main import run_words
before = peak()
run_words(sys.argv[1:])
print(peak() - before)
"""


def save_random(folder: Path, config: dict[str, Any]) -> int:
    """Write a model in float32; return the size of its weights in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = shapes_of(weight_mapping(config).entries())
    with SafetensorsWriter(folder / "model.safetensors", shapes, torch.float32) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape))
    return (folder / "model.safetensors").stat().st_size


def peak_of(words: list[Any]) -> int:
    """Bytes that a command needs at most, beyond what the program needs to start."""
    program = [sys.executable, "-W", "ignore", "-c", MEASURE]
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def test_peak_memory(tmp_path):
    """840 MB of weights in less than 290 MB beyond what the program needs to start."""
    hf = tmp_path / "hf"
    total = save_random(hf, CONFIG)
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    for words in (
        ["import", "--hf", hf, "--save", megatron],
        ["export", "--load", megatron, "--save", back],
    ):
        used = peak_of(words)
        assert used < 2 * LARGEST + 160 * 2**20 < total / 2, words[0]
    assert (back / "model.safetensors").read_bytes() == (hf / "model.safetensors").read_bytes()


def test_peak_memory_of_a_merge(tmp_path):
    """Three folders of 250 MB each: a tensor of each of them, and what SCE computes with."""
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 8}
    folders = [tmp_path / name for name in ("base", "a", "b")]
    total = min(save_random(folder, config | {"vocab_size": 2048}) for folder in folders)
    base, *models = folders
    words = ["merge", "--method", "sce", "--base", base, "--models", *models]
    used = peak_of([*words, "--output", tmp_path / "out"])
    elements = 4096 * 512
    assert used < 40 * elements + 60 * 2**20 < 0.7 * total, used
