"""Score with Hugging Face transformers: any causal LM, one response at a time."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_infifpo import cpu
from megatron_infifpo.cli import UserError

CHUNK_ROWS = 512


class TransformersBackend:
    """A source model run forward by transformers.

    Ranks are data parallel, each with the whole model, or form one tensor-parallel group with the
    model's own plan.
    """

    name = "transformers"
    pad_multiple = 1

    def __init__(
        self,
        directory: str | Path,
        *,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        bf16: bool = False,
        trust_remote_code: bool = False,
    ):
        """Load the model.

        Raises:
            UserError: pipeline parallelism, or tensor parallelism over some of the ranks only.
        """
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        if pipeline_parallel != 1:
            raise UserError("--backend transformers has no pipeline parallelism: use megatron")
        if tensor_parallel not in (1, world):
            raise UserError(
                f"--backend transformers shards a model over all ranks or none: "
                f"--tensor-model-parallel-size is {tensor_parallel}, expected 1 or {world}"
            )
        cuda = torch.cuda.is_available() and not cpu.is_enabled()
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if not cuda:
            self.device = torch.device("cpu")
        sharded = tensor_parallel > 1
        placement = {"tp_plan": "auto"} if sharded else {"device_map": {"": self.device}}
        self.model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **placement,
        ).eval()
        config = self.model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.context_length: int = config.max_position_embeddings
        self.data_parallel_rank, self.data_parallel_size = (0, 1) if sharded else (rank, world)
        self.is_writer = rank == 0 or not sharded

    def __call__(self, rows: list[dict]) -> list[Tensor]:
        """Score packed rows: the `[K]` float32 log-probs of each row, in the row's order."""
        return [self._score_row(row) for row in rows]

    @torch.no_grad()
    def _score_row(self, row: dict) -> Tensor:
        borders = row["cu_seqlens"]
        scored, targets = row["scored_rows"], row["target_ids"]
        pieces = []
        for start, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            inside = (scored >= start) & (scored < end)
            if inside.any():
                ids = row["tokens"][:, start:end].to(self.device)
                pieces.append(self._score_segment(ids, scored[inside] - start, targets[inside]))
        return torch.cat(pieces)

    def _score_segment(self, ids: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        """Log-probs `[k]` of `targets` at `rows` of one sequence `[1, L]`."""
        rows, targets = rows.to(self.device), targets.to(self.device)
        logits = self.model(input_ids=ids, logits_to_keep=rows, use_cache=False).logits[0]
        # Chunked, since float32 copies of a large vocabulary's logits are the peak of memory.
        chunks = zip(logits.split(CHUNK_ROWS), targets.split(CHUNK_ROWS), strict=True)
        logprobs = [
            part.float().log_softmax(-1).gather(1, target[:, None]).squeeze(1)
            for part, target in chunks
        ]
        return torch.cat(logprobs).cpu()
