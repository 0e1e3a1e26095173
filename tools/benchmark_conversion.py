#!/usr/bin/env python
"""Time and memory of import and export, against copying the same files.

Makes a random checkpoint of Phi-4's shape with fewer layers (two: 3.4 GB in bfloat16), then runs
each of the converter's commands, and a plain copy, as a process of its own.

    python tools/benchmark_conversion.py --folder /scratch/benchmark
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_infifpo.commands.entry import run
from megatron_infifpo.families import PUBLISHED, weight_mapping
from megatron_infifpo.storage.safetensors_io import SafetensorsWriter

PHI4 = {**PUBLISHED["phi-4"]} | {"architectures": ["Phi3ForCausalLM"], "dtype": "bfloat16"}
CONVERT = str(Path(__file__).resolve().with_name("convert_checkpoint.py"))
# Reads and writes as conversion does, down to the disk: no clever copy of the file system's own.
COPY = """
import os, sys, pathlib
source, target = map(pathlib.Path, sys.argv[1:])
target.mkdir()
buffer = memoryview(bytearray(16 * 2**20))
for path in sorted(source.glob("*.safetensors")):
    with open(path, "rb", buffering=0) as a, open(target / path.name, "wb", buffering=0) as b:
        while count := a.readinto(buffer):
            b.write(buffer[:count])
        os.fsync(b.fileno())
"""


def main() -> None:
    """Make the checkpoint, run everything, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="new; needs four checkpoints")
    parser.add_argument("--layers", type=int, default=2, help="of the checkpoint (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the fastest counts")
    args = parser.parse_args()
    hf = args.folder / "hf"
    largest = make_checkpoint(hf, args.layers)
    total = sum(path.stat().st_size for path in hf.glob("*.safetensors"))
    print(f"{total / 1e9:.2f} GB, two largest tensors {sum(largest) / 2**20:.0f} MiB")
    commands = {
        "copy": ["-c", COPY, str(hf), "{}"],
        "import": [CONVERT, "import", "--hf", str(hf), "--save", "{}"],
        "export": [CONVERT, "export", "--load", str(args.folder / "import"), "--save", "{}"],
        "start only": [CONVERT, "--help"],
    }
    print(f"{'':<12}{'seconds':>9}{'of copy':>9}{'peak MiB':>10}")
    base = 0.0
    for name, words in commands.items():
        target = args.folder / name
        argv = [word.replace("{}", str(target)) for word in words]
        results = [measure(argv, target) for _ in range(args.rounds)]
        seconds, peak = min(r[0] for r in results), max(r[1] for r in results)
        base = base or seconds
        print(f"{name:<12}{seconds:>9.2f}{seconds / base:>9.2f}{peak:>10.0f}", flush=True)


def make_checkpoint(folder: Path, layers: int) -> list[int]:
    """Write random weights; return the bytes of the two largest tensors."""
    folder.mkdir(parents=True)
    config = PHI4 | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {
        name: shape
        for entry in weight_mapping(config).entries()
        for name, shape in zip(entry.hf_names, entry.hf_shapes, strict=True)
    }
    with SafetensorsWriter(folder / "model.safetensors", shapes, torch.bfloat16) as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.randn(shape, dtype=torch.bfloat16))
    return sorted(2 * torch.Size(shape).numel() for shape in shapes.values())[-2:]


def measure(argv: Sequence[str], target: Path) -> tuple[float, float]:
    """Run a command that makes `target`, anew; return seconds and peak resident MiB."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    assert status == 0, f"{argv} failed"
    return seconds, usage.ru_maxrss / 1024


if __name__ == "__main__":
    run(main)
