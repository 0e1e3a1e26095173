"""Start ranks: torch.distributed and Megatron's process groups."""

import datetime
import os
from dataclasses import dataclass

import torch

from megatron_infifpo.errors import UserError
from megatron_infifpo.patches import cpu

# Ranks of a scoring job drift apart, and all wait while the first reads or merges: the usual ten
# minutes would end the job.
WAIT = datetime.timedelta(hours=12)
_SEED = 1234  # Megatron asks for one; nothing is drawn forward


@dataclass(frozen=True)
class ModelLayout:
    """How a model that is only run forward lies on ranks, and in which precision.

    Attributes:
        tensor_parallel, pipeline_parallel: ranks a tensor and layers are spread over.
        virtual_pipeline: model chunks a pipeline rank, or None.
        context_parallel: ranks that each compute a part of a row.
        expert_parallel, expert_tensor_parallel: ranks that the experts of a layer, and each expert,
            are spread over.
        bf16: weights and activations in bfloat16, else float32.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    virtual_pipeline: int | None = None
    context_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    bf16: bool = False

    def check_experts_of_a_row(self) -> None:
        """Raise UserError where ranks of several rows would have to compute in step.

        A layer's experts are asked by all ranks that share them at once. Rows of data-parallel
        ranks are not as many, so these must not share experts.
        """
        sharing, row = self.expert_parallel * self.expert_tensor_parallel, self.tensor_parallel
        row *= self.context_parallel
        if row % sharing:
            raise UserError(
                f"--expert-model-parallel-size is {self.expert_parallel}, with "
                f"--expert-tensor-parallel-size {self.expert_tensor_parallel}, but {row} ranks "
                "compute a row together (tensor x context parallel size), expected that the "
                f"product divides them: raise --tensor-model-parallel-size or "
                "--context-parallel-size, or spread experts over fewer ranks"
            )


def one_rank_by_default() -> None:
    """Let a program run alone, where Megatron wants to hear from torchrun."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")


def initialize_parallel(layout: ModelLayout) -> None:
    """Start torch.distributed (as torchrun or srun set it up, or alone) and Megatron's groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        backend = "gloo" if cpu.is_enabled() else "nccl"
        if "WORLD_SIZE" in os.environ:
            if not cpu.is_enabled():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            torch.distributed.init_process_group(backend, timeout=WAIT)
        else:
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            layout.tensor_parallel,
            layout.pipeline_parallel,
            layout.virtual_pipeline,
            context_parallel_size=layout.context_parallel,
            expert_model_parallel_size=layout.expert_parallel,
            expert_tensor_parallel_size=layout.expert_tensor_parallel,
        )
        model_parallel_cuda_manual_seed(_SEED)
