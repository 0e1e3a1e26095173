"""What forked ranks run in tests of the start."""

import sys
from types import SimpleNamespace
from typing import Any


def start_megatron() -> dict[str, Any]:
    """Run what Megatron does at a start beside training, as it is on a GPU.

    Returns:
        The module of the function that compiles helpers before our patches; programs that Megatron
        started; operations on tensors that it warmed up with.
    """
    import megatron.core.datasets.utils as dataset_utils
    import megatron.training.initialize as initialize
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode

    from megatron_infifpo.patches.apply import apply_patches
    from megatron_infifpo.storage.checksums import write_checksums
    from megatron_infifpo.training.schedule import training_schedule

    found: dict[str, Any] = {"helpers before": dataset_utils.compile_helpers.__module__}
    found["processes"], found["ops"] = [], 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found["ops"] += 1
            return func(*args, **(kwargs or {}))

    def note(event: str, arguments: tuple) -> None:
        if event in ("subprocess.Popen", "os.system", "os.posix_spawn"):
            found["processes"].append(str(arguments))

    apply_patches(training_schedule(), write_checksums)
    dist.init_process_group("gloo")
    initialize.get_args = lambda: SimpleNamespace()  # whoever reads an argument fails
    sys.addaudithook(note)
    initialize._compile_dependencies()
    with Count():
        initialize.set_jit_fusion_options()
    return found
