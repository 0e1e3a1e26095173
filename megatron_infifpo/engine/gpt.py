"""From an architecture to Megatron's GPTModel: the one place where the model is built.

Training hands `model_config(args)` to Megatron's `pretrain`; the scorer and the converter's
`verify` build the same model, forward only, with `build_model`.
"""

import argparse
import contextlib
import io
import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.arguments import add_megatron_arguments, validate_args
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_infifpo.engine.layer_kind import KINDS, LayerKind, choose_kind
from megatron_infifpo.engine.packed import RowRope
from megatron_infifpo.errors import UserError
from megatron_infifpo.families import FAMILIES
from megatron_infifpo.patches import cpu


def fixed_arguments(kind: LayerKind) -> dict[str, Any]:
    """Megatron arguments that packed rows, the layers and the device leave no choice about."""
    fixed: dict[str, Any] = {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "calculate_per_token_loss": True,
        "dataloader_type": "external",
        # Only a mixture of experts has a dispatcher, but the default one forbids variable lengths.
        "moe_token_dispatcher_type": "alltoall",
    }
    fixed |= kind.arguments
    if cpu.is_enabled():
        fixed |= cpu.argument_overrides()
    return fixed


def model_config(args: argparse.Namespace) -> GPTModelConfig:
    """Megatron's model configuration for packed rows, from validated Megatron arguments.

    `args.layer_kind` is a key of `KINDS`, `args.family` one of `FAMILIES`.

    `args.padded_vocab_size` is the vocabulary of the checkpoint; Megatron pads it to a multiple of
    `--make-vocab-size-divisible-by` times TP, and our log-prob head ignores the padding.
    """
    kind = KINDS[args.layer_kind]
    config = gpt_config_from_args(args)
    config.should_pad_vocab = True
    config.rope_scaling_factor = args.rope_scaling_factor
    # Rows have lengths of their own.
    config.transformer.variable_seq_lengths = True
    # It works around a mistake of PyTorch older than ours, with a wait for the GPU every time.
    config.transformer.batch_p2p_sync = False
    config.transformer.layer_kind = kind
    family, extras = FAMILIES[args.family].layers(), args.extras
    family.configure(config, extras)

    def block(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
        return kind.block(family, config.transformer, vp_stage)

    def complete(models: list[GPTModel]) -> list[GPTModel]:
        for model in models:
            family.complete(model, extras)
            if kind.rotates_by_row:
                model.rotary_pos_emb = RowRope(model.rotary_pos_emb)
        return models

    config.transformer_layer_spec = block
    config.pre_wrap_hooks.append(complete)
    return config


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Let Megatron check flags inside; what it refuses is the user's to mend."""
    try:
        yield
    except UserError:  # of ours
        raise
    except (AssertionError, ValueError) as error:
        # Some of its assertions say nothing: then the condition does.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"Megatron refuses these flags: {reason}") from error


def validate(args: argparse.Namespace) -> None:
    """Let Megatron check and complete its arguments."""
    with refusals():
        validate_args(args)


def forward_only_arguments(
    model_args: Mapping[str, Any],
    *,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    virtual_pipeline: int | None = None,
    bf16: bool = False,
) -> argparse.Namespace:
    """Validated Megatron arguments of a model that is only run forward.

    Args:
        model_args: architecture, as `megatron_args` of a model family returns it.
        tensor_parallel, pipeline_parallel: ranks a tensor and layers are spread over.
        virtual_pipeline: model chunks a pipeline rank, or None.
        bf16: weights and activations in bfloat16, else float32.
    """
    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    args = parser.parse_args([])
    vars(args).update(model_args)
    args.bf16 = bf16
    kind = choose_kind(args)
    args.layer_kind = kind.name
    vars(args).update(fixed_arguments(kind))
    args.gradient_accumulation_fusion = False  # there are no gradients
    args.rank = int(os.environ.get("RANK", "0"))
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    args.tensor_model_parallel_size = tensor_parallel
    args.pipeline_model_parallel_size = pipeline_parallel
    if virtual_pipeline is not None:
        args.num_virtual_stages_per_pipeline_rank = virtual_pipeline
    args.micro_batch_size = 1
    args.seq_length = args.max_position_embeddings
    args._is_global_batch_size_explicitly_specified = False
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
        validate(args)
    return args


def build_model(args: argparse.Namespace) -> list[GPTModel]:
    """Build this rank's model chunks in evaluation mode, weights not loaded.

    `parallel.initialize_parallel(args)` must have run. One chunk, or one a virtual pipeline stage.
    """
    config = model_config(args)
    config.transformer.perform_initialization = False
    config.finalize()
    builder = GPTModelBuilder(config)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    virtual = args.virtual_pipeline_model_parallel_size
    stages = [None] if virtual is None else list(range(virtual))
    models = [builder.build_model(groups, vp_stage=stage) for stage in stages]
    for hook in config.pre_wrap_hooks:
        models = hook(models)
    for model in models:
        model.to(device=torch.cuda.current_device(), dtype=args.params_dtype)
        model.eval().requires_grad_(False)
    return models
