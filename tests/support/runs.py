"""Training runs of several layouts: what tests start, and how they read the results."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_infifpo.storage.checkpoints import find_checkpoint
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint

# name -> ranks, flags
LAYOUTS = {
    "tp1": (1, []),
    "tp2": (2, ["--tensor-model-parallel-size", "2"]),
    "pp2": (2, ["--pipeline-model-parallel-size", "2"]),
    "dp2": (2, []),
    "tp2-pp2": (4, ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]),
    "pp4": (4, ["--pipeline-model-parallel-size", "4"]),
    "tp2-sp": (2, ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
    "pp2-vpp2": (
        2,
        ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
    ),
    "cp2": (2, ["--context-parallel-size", "2"]),
}
BOTH = ("{name: qwen, logprobs: qwen}", "{name: phi, logprobs: phi, domains: [code]}")

# For runs that are compared: else Adam makes whole steps of gradients that are nothing but
# rounding, where sums cancel.
EPSILON = ("--adam-eps", "1e-5")


def steps_of(results: list[dict]) -> list[dict]:
    """Metrics of each step, from a rank of the last pipeline stage."""
    return next(r["steps"] for r in reversed(results) if r["steps"][0])


def exported(ranks, checkpoint, folder) -> dict[str, torch.Tensor]:
    """Parameters of a trained checkpoint under their Hugging Face names."""
    ranks(1, "support.tools:export", str(checkpoint), str(folder))
    return load_file(folder / "model.safetensors")


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Whole parameters of a run's newest checkpoint, under Megatron's names, of any layout."""
    checkpoint = TorchDistCheckpoint(find_checkpoint(folder))
    found = {}
    for name in checkpoint.names():
        shape = checkpoint.shape(name)
        found[name] = checkpoint.read(name, (0,) * len(shape), shape)
    return found


def flags(setup, *more: str, without: tuple[str, ...] = ()) -> list[str]:
    """Command line of three steps, less some flags."""
    argv = setup.flags(setup.sources("both", *BOTH), *more)
    for flag in without:
        at = argv.index(flag)
        del argv[at : at + (1 if flag == "--use-distributed-optimizer" else 2)]
    return argv


def losses(results: list[dict]) -> list[float]:
    return [step["loss"] for step in steps_of(results)]
