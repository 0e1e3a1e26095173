"""The families group where Transformer Engine's Python is: its kernels are emulated on the CPU."""

from pathlib import Path
from typing import Any


def families(argument: list[str]) -> None:
    """Run the group: `[folder of Transformer Engine, folder, file of checks]`."""
    te, folder, path = argument
    from support import te_emulation

    te_emulation.load(Path(te))
    import megatron_infifpo.training.run  # noqa: F401  (readies Megatron for the CPU)
    from support import te_layers

    te_layers.as_on_a_gpu()
    import megatron_infifpo.gpu_check.families
    from megatron_infifpo.gpu_check.records import Options, Recorder

    group: Any = megatron_infifpo.gpu_check.families
    group.QUICK = ("qwen2-tied", "gemma3")
    group.check(Options("cpu", True, 1, ("tiny",), folder, 600.0), Recorder("families", path))
