"""Start ranks: torch.distributed and Megatron's process groups."""

import argparse
import datetime
import os

import torch

from megatron_infifpo.patches import cpu

# Ranks of a scoring job drift apart, and all wait while the first reads or merges: the usual ten
# minutes would end the job.
WAIT = datetime.timedelta(hours=12)


def one_rank_by_default() -> None:
    """Let a program run alone, where Megatron wants to hear from torchrun."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")


def initialize_parallel(args: argparse.Namespace) -> None:
    """Start torch.distributed (as torchrun or srun set it up, or alone) and Megatron's groups.

    Args:
        args: validated Megatron arguments.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        backend = args.distributed_backend
        if "WORLD_SIZE" in os.environ:
            if not cpu.is_enabled():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            torch.distributed.init_process_group(backend, timeout=WAIT)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.virtual_pipeline_model_parallel_size,
        )
        model_parallel_cuda_manual_seed(args.seed)
