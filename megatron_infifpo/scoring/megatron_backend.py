"""Score with Megatron: tensor and pipeline parallel, packed rows, response-only log-probs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_infifpo.patches import cpu

cpu.enable()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.utils import get_model_config  # noqa: E402

from megatron_infifpo.convert.adapters import holds_adapters  # noqa: E402
from megatron_infifpo.convert.block_fp8 import scored_config  # noqa: E402
from megatron_infifpo.convert.hf_weights import load_into_model  # noqa: E402
from megatron_infifpo.convert.megatron_folder import named_otherwise  # noqa: E402
from megatron_infifpo.engine.gpt import build_model  # noqa: E402
from megatron_infifpo.engine.layer_kind import LayerKind  # noqa: E402
from megatron_infifpo.engine.older import accept_older  # noqa: E402
from megatron_infifpo.engine.packed import score_rows  # noqa: E402
from megatron_infifpo.engine.parallel import ModelLayout  # noqa: E402
from megatron_infifpo.families import (  # noqa: E402
    check_expert_parallel,
    check_pipeline_parallel,
    check_tensor_parallel,
    megatron_args,
)
from megatron_infifpo.rows import Row  # noqa: E402
from megatron_infifpo.storage.checkpoints import find_checkpoint  # noqa: E402
from megatron_infifpo.storage.torch_dist import TorchDistCheckpoint  # noqa: E402


def load_megatron_checkpoint(models: list[GPTModel], directory: str | Path) -> None:
    """Fill built model chunks from a torch_dist checkpoint, whatever layout saved it."""
    path = str(find_checkpoint(directory))
    checkpoint = TorchDistCheckpoint(Path(path))  # refused before PyTorch unpickles it
    if holds_adapters(checkpoint) or named_otherwise(checkpoint, directory):
        load_into_model(models, directory)
        return
    accept_older(checkpoint, models)
    for model in models:
        # Nested, since the checkpoint's common state arrives beside the weights.
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, path)
        model.load_state_dict(state["model"])


class MegatronBackend:
    """A source model, or the pivot, run forward by Megatron at a parallel layout."""

    def __init__(
        self,
        directory: str | Path,
        *,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        context_parallel: int = 1,
        expert_parallel: int = 1,
        expert_tensor_parallel: int = 1,
        bf16: bool = False,
        hf: str | Path | None = None,
    ):
        """Build the model and load its weights.

        Args:
            directory: a Hugging Face folder (converted in memory) or a Megatron checkpoint.
            tensor_parallel, pipeline_parallel, context_parallel: the layout; the other ranks are
                data parallel.
            expert_parallel, expert_tensor_parallel: ranks that the experts of a layer, and each of
                them, are spread over: of those that compute a row together.
            bf16: weights and activations in bfloat16, else float32; log-softmax is float32.
            hf: of a checkpoint that carries no config.json, the Hugging Face folder that has it.

        Raises:
            UserError: an unknown architecture, an illegal layout, or unreadable weights.
        """
        architecture = megatron_args(scored_config(hf or directory))
        check_tensor_parallel(architecture, tensor_parallel)
        check_pipeline_parallel(architecture, pipeline_parallel)
        check_expert_parallel(architecture, expert_parallel, expert_tensor_parallel)
        layout = ModelLayout(
            tensor_parallel,
            pipeline_parallel,
            context_parallel=context_parallel,
            expert_parallel=expert_parallel,
            expert_tensor_parallel=expert_tensor_parallel,
            bf16=bf16,
        )
        layout.check_experts_of_a_row()
        self.models = build_model(architecture, layout)
        if hf is not None or (Path(directory) / "config.json").is_file():
            load_into_model(self.models, directory, scored=True, hf=hf)
        else:
            load_megatron_checkpoint(self.models, directory)
        config = get_model_config(self.models[0])
        self.facts = {"router_dtype": config.moe_router_dtype} if config.num_moe_experts else {}
        self.vocab_size: int = architecture["padded_vocab_size"]
        kind: LayerKind = config.layer_kind
        self.layout = kind.row_layout(tensor_parallel, context_parallel=context_parallel)
        self.data_parallel_rank = parallel_state.get_data_parallel_rank()
        self.data_parallel_size = parallel_state.get_data_parallel_world_size()
        self.is_writer = (
            parallel_state.is_pipeline_last_stage()
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
        )

    def __call__(self, rows: list[Row], on_row: Callable[[Row], None] | None = None) -> list[Any]:
        """Score packed rows.

        Args:
            rows: collated rows.
            on_row: called with each row once this rank has done its part of it.

        Returns:
            What `score_rows` does: on the last pipeline stage the `[K]` float32 log-probs of each
            row, or `TopLogprobs` of one with `own_top`; else an empty list.
        """
        return score_rows(self.models, rows, self.vocab_size, on_row)
